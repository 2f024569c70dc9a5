"""A saved cache goes on bit by bit as the one that was saved, and what does not fit is refused."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import models
from caches import NEW_TOKENS, generate
from mmshiftkv import (
    METHODS,
    ExpectedAttentionCache,
    Method,
    PrefillSelectionCache,
    ShiftKVCache,
    SnapKVCache,
    make_cache,
)

BUDGET, TOKENS = 16, 40
SETTINGS = {"snapkv": {"window": 4}}


def after_a_prompt(cache, model, inputs=None):
    answer = generate(model, cache, models.prompt_ids(1, TOKENS) if inputs is None else inputs).sequences
    turn = torch.cat([answer, models.prompt_ids(answer.shape[0], 5, seed=5)], dim=1)
    return {"input_ids": turn, "attention_mask": torch.ones_like(turn)}


def assert_goes_on_the_same(model, cache, loaded, turn):
    expected, found = (generate(model, one, turn) for one in (cache, loaded))
    assert found.sequences.equal(expected.sequences)
    assert all(mine.equal(theirs) for mine, theirs in zip(found.logits, expected.logits, strict=True))
    for name in ("tokens_seen", "tokens_stored", "bytes_full"):
        assert getattr(loaded.report(), name) == getattr(cache.report(), name)
    for layer in range(len(cache)):
        assert loaded.kept_indices(layer).equal(cache.kept_indices(layer))


@pytest.mark.parametrize("room", [None, 2 * NEW_TOKENS])
@pytest.mark.parametrize("method", METHODS[1:])
def test_all_methods(tmp_path, method, room):
    model = models.text_model()
    cache = make_cache(method, model, BUDGET, max_new_tokens=room, **SETTINGS.get(method, {}))
    turn = after_a_prompt(cache, model)
    cache.save(tmp_path / "cache.kv")
    loaded = type(cache).load(tmp_path / "cache.kv", model)
    assert loaded.is_compileable == (room is not None)
    assert_goes_on_the_same(model, cache, loaded, turn)


@pytest.mark.parametrize("settings", [{"preset": "value-aware"}, {"gamma": [1.0, 2.0, 3.0]}, {"budget": 1.0}])
def test_settings_serve_the_next_prompt_too(tmp_path, settings):
    model = models.text_model()
    cache = ShiftKVCache(model, **{"budget": BUDGET, **settings})
    turn = after_a_prompt(cache, model)
    cache.save(tmp_path / "cache.kv")
    loaded = ShiftKVCache.load(tmp_path / "cache.kv", model)
    assert loaded.config == cache.config
    assert_goes_on_the_same(model, cache, loaded, turn)
    for one in (cache, loaded):
        one.reset()
        after_a_prompt(one, model, models.prompt_ids(1, TOKENS, seed=9))
    assert all(mine.keys.equal(theirs.keys) for mine, theirs in zip(loaded.layers, cache.layers, strict=True))


def test_a_padded_batch_in_bfloat16(tmp_path):
    model = models.text_model().to(torch.bfloat16)
    cache = ShiftKVCache(model, budget=BUDGET)
    inputs = models.left_padded([TOKENS, 11])
    answer = generate(model, cache, inputs).sequences
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW_TOKENS, dtype=torch.long)], dim=1)
    cache.save(tmp_path / "cache.kv")
    more = models.prompt_ids(2, 3, seed=4)
    turn = {"input_ids": torch.cat([answer, more], 1), "attention_mask": torch.cat([mask, torch.ones_like(more)], 1)}
    assert_goes_on_the_same(model, cache, ShiftKVCache.load(tmp_path / "cache.kv", model), turn)


def test_storage_may_become_fixed(tmp_path):
    model = models.text_model()
    cache = ShiftKVCache(model, budget=BUDGET)
    turn = after_a_prompt(cache, model)
    cache.save(tmp_path / "cache.kv")
    loaded = ShiftKVCache.load(tmp_path / "cache.kv", model, max_new_tokens=20)
    assert loaded.is_compileable
    assert generate(model, loaded, turn).sequences.equal(generate(model, cache, turn).sequences)
    assert loaded.layers[0].slots == BUDGET + NEW_TOKENS - 1 + 20


def test_a_file_gives_no_leave_to_another_prompt(tmp_path):
    model = models.text_model()
    cache = ShiftKVCache(model, budget=BUDGET)
    after_a_prompt(cache, model)
    cache.save(tmp_path / "cache.kv")
    loaded = ShiftKVCache.load(tmp_path / "cache.kv", model)
    with pytest.raises(ValueError, match="do not begin with the prompt of 40 columns"):
        generate(model, loaded, models.prompt_ids(1, 60, seed=8))


@dataclass(frozen=True)
class LongKeys(Method):
    def observe(self, layer, inputs, earlier):
        return None

    def score(self, layer, summary, keys, values, valid):
        return keys.float().norm(dim=-1)


def test_a_method_of_ones_own_is_given_again(tmp_path):
    model = models.text_model()
    cache = PrefillSelectionCache(model, LongKeys(), BUDGET)
    turn = after_a_prompt(cache, model)
    cache.save(tmp_path / "cache.kv")
    loaded = PrefillSelectionCache.load(tmp_path / "cache.kv", model, method=LongKeys())
    assert_goes_on_the_same(model, cache, loaded, turn)


class TestRefused:
    @pytest.fixture
    def path(self, tmp_path):
        model = models.text_model()
        cache = ShiftKVCache(model, budget=BUDGET)
        after_a_prompt(cache, model)
        cache.save(tmp_path / "cache.kv")
        return tmp_path / "cache.kv"

    def rewritten(self, path, change):
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata(), list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        metadata = change(metadata, tensors)
        save_file(tensors, path, metadata=metadata)
        return path

    @pytest.mark.parametrize(
        ("make", "what"),
        [
            (lambda: models.text_model(seed=1), "its weights differ"),
            (lambda: models.text_model(num_key_value_heads=4), "num_key_value_heads is 2 there and 4 here"),
            (lambda: models.text_model("qwen2"), "model_type is 'llama' there and 'qwen2' here"),
            (lambda: models.text_model().to(torch.bfloat16), "dtype is 'float32' there and 'bfloat16' here"),
        ],
    )
    def test_another_model(self, path, make, what):
        with pytest.raises(ValueError, match=f"saved with another model: {what}"):
            ShiftKVCache.load(path, make())

    def test_another_class(self, path):
        with pytest.raises(ValueError, match=r"holds a ShiftKVCache, not a SnapKVCache; use ShiftKVCache\.load"):
            SnapKVCache.load(path, models.text_model())

    @pytest.mark.parametrize("place", [5, 200, -5])
    def test_a_changed_byte(self, path, place):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            ShiftKVCache.load(path, models.text_model())

    def test_a_cut_file(self, path):
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="damaged"):
            ShiftKVCache.load(path, models.text_model())

    def test_another_file(self, path):
        path.write_bytes(b"a text")
        with pytest.raises(ValueError, match="damaged, or no file of mmshiftkv"):
            ShiftKVCache.load(path, models.text_model())
        save_file({"a": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match="no file of mmshiftkv"):
            ShiftKVCache.load(path, models.text_model())

    def test_a_newer_format(self, path):
        import mmshiftkv.saving as saving

        def newer(metadata, tensors):
            text = json.dumps({**json.loads(metadata["mmshiftkv"]), "format": 2, "layers": "of another kind"})
            return {"mmshiftkv": text, "sha256": saving._digest(text, tensors)}

        self.rewritten(path, newer)
        with pytest.raises(ValueError, match=r"newer mmshiftkv \(format 2; this one reads 1\)"):
            ShiftKVCache.load(path, models.text_model())

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing"):
            ShiftKVCache.load(tmp_path / "nothing.kv", models.text_model())

    def test_a_cache_without_a_prompt_leaves_the_old_file(self, path):
        before = path.read_bytes()
        with pytest.raises(ValueError, match="holds no complete prompt"):
            ExpectedAttentionCache(models.text_model(), BUDGET).save(path)
        assert path.read_bytes() == before
        assert [each.name for each in path.parent.iterdir()] == [path.name]

    def test_layers_of_other_kinds(self, tmp_path):
        model = models.text_model("gemma3_text", **models.HYBRIDS["gemma3_text"])
        cache = ShiftKVCache(model, budget=BUDGET)
        after_a_prompt(cache, model)
        with pytest.raises(ValueError, match=r"layers \[0, 2\] are no full-attention layers"):
            cache.save(tmp_path / "cache.kv")
