"""Arguments of `generate` that have to do with a cache."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import models
from caches import (
    FAMILIES_AND_STORAGES,
    NEW_TOKENS,
    STORAGES,
    assert_same,
    contents,
    covering,
    dynamic,
    filled,
    generate,
    model_of,
)
from mmshiftkv import ShiftKVCache

BUDGET = 7
VISION_FAMILIES = ("qwen2_5_vl", "vicuna", "mistral")


@pytest.mark.parametrize(("family", "storage"), FAMILIES_AND_STORAGES)
def test_embeddings_in_the_place_of_ids(family, storage):
    model, ids = model_of(family), models.prompt_ids(2, 24)
    embeddings = {"inputs_embeds": model.get_input_embeddings()(ids)}
    for budget in (1.0, BUDGET):
        cache, expected = ShiftKVCache(model, budget=budget, **STORAGES[storage]), ShiftKVCache(model, budget=budget)
        found = generate(model, cache, embeddings)
        plain = generate(model, expected, ids)
        assert found.sequences.equal(plain.sequences[:, 24:])
        assert_same(found.logits, plain.logits, storage)
        both = generate(
            model, ShiftKVCache(model, budget=budget, **STORAGES[storage]), {"input_ids": ids, **embeddings}
        )
        assert both.sequences.equal(plain.sequences)


@pytest.mark.parametrize(("family", "storage"), FAMILIES_AND_STORAGES)
def test_no_prompt_at_all_begins_with_one_token(family, storage):
    """`generate` makes a prompt of the token that begins texts: shorter than any budget."""
    model = model_of(family)
    expected = generate(model, dynamic(model), {})
    for budget in (1.0, 1, BUDGET):
        cache = ShiftKVCache(model, budget=budget, **STORAGES[storage])
        found = generate(model, cache, {})
        assert found.sequences.equal(expected.sequences)
        assert_same(found.logits, expected.logits, storage)
        assert cache.get_seq_length() == NEW_TOKENS


@pytest.mark.parametrize(("family", "storage"), FAMILIES_AND_STORAGES)
def test_positions_given_and_not_given_are_the_same(family, storage):
    model, ids = model_of(family), models.prompt_ids(1, 24)
    for budget in (1.0, BUDGET):
        with_positions, without = (
            generate(model, ShiftKVCache(model, budget=budget, **STORAGES[storage]), inputs)
            for inputs in ({"input_ids": ids, "position_ids": torch.arange(24)[None]}, {"input_ids": ids})
        )
        assert_same(with_positions.logits, without.logits)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_images(vision_case, family, mode, storage):
    case = vision_case(family)
    inputs = case.prompts(2)
    expected = generate(case.model, dynamic(case.model), inputs, **mode)
    found = generate(case.model, covering(case.model, storage), inputs, **mode)
    assert found.sequences.equal(expected.sequences)
    assert_same(found.logits, expected.logits, storage)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("padding", [1, 8, 40])
def test_more_padding_on_the_left_changes_nothing(storage, padding):
    """A covering budget is one of tokens here: padding that is kept must not take a token's place."""
    model, ids = model_of("llama"), models.prompt_ids(1, 24)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], dim=1),
        "attention_mask": (torch.arange(24 + padding) >= padding).long()[None],
    }
    for budget in (24, BUDGET):
        cache = ShiftKVCache(model, budget=budget, **STORAGES[storage])
        found = generate(model, cache, padded)
        plain = generate(model, ShiftKVCache(model, budget=budget), ids)
        assert found.sequences[:, padding:].equal(plain.sequences)
        torch.testing.assert_close(found.logits, plain.logits, atol=1e-4, rtol=1e-4)


CHUNKED = {"as-single": {}, "as-chunked": {"prefill": "chunked"}, "fixed": STORAGES["fixed"]}


@pytest.mark.parametrize("chunk", [5, 23, 24, 30])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param(family, CHUNKED[name], id=f"{family}-{name}")
        for family in ("llama", "qwen3", "gemma3_text", "mixtral")
        for name in CHUNKED
    ],
)
def test_prefill_in_chunks(family, settings, chunk):
    """Chunks of 23 leave one token for the last, which is not the first of the answer."""
    model, inputs = model_of(family), models.left_padded([24, 13])
    storage = "fixed" if "max_new_tokens" in settings else "growing"
    expected = generate(model, dynamic(model), inputs, prefill_chunk_size=chunk)
    found = generate(model, ShiftKVCache(model, budget=1.0, **settings), inputs, prefill_chunk_size=chunk)
    assert found.sequences.equal(expected.sequences)
    assert_same(found.logits, expected.logits, storage)
    small, whole = ShiftKVCache(model, budget=BUDGET, **settings), ShiftKVCache(model, budget=BUDGET)
    found, expected = generate(model, small, inputs, prefill_chunk_size=chunk), generate(model, whole, inputs)
    assert found.sequences.equal(expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)
    assert small.report().tokens_stored == whole.report().tokens_stored


class TestRefusedByTransformers:
    @pytest.mark.parametrize("implementation", ["static", "dynamic", "offloaded"])
    @pytest.mark.parametrize("storage", STORAGES)
    def test_a_cache_and_the_name_of_another(self, storage, implementation):
        model = model_of("llama")
        cache = ShiftKVCache(model, budget=BUDGET, **STORAGES[storage])
        with pytest.raises(ValueError, match="cache_implementation"):
            generate(model, cache, models.prompt_ids(), cache_implementation=implementation)
        assert cache.get_seq_length() == 0
        expected = generate(model, ShiftKVCache(model, budget=BUDGET), models.prompt_ids())
        assert generate(model, cache, models.prompt_ids()).sequences.equal(expected.sequences)

    def test_what_a_cache_holds_as_a_tuple(self):
        model = model_of("llama")
        held = tuple(contents(filled(model, ShiftKVCache(model, budget=BUDGET), models.prompt_ids())))
        with pytest.raises(ValueError, match="a tuple "):
            generate(model, held, models.prompt_ids())

    def test_a_ready_made_mask(self):
        model = model_of("llama")
        mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match="must be 2D"):
            generate(
                model,
                ShiftKVCache(model, budget=BUDGET),
                {"input_ids": models.prompt_ids(1, 24), "attention_mask": mask},
            )


class TestWithoutUseCache:
    """`use_cache=False` and a cache all the same: `generate` feeds the whole text to any cache at every step."""

    @pytest.mark.parametrize("budget", [BUDGET, 24])
    @pytest.mark.parametrize("storage", STORAGES)
    def test_the_text_is_not_fed_again(self, storage, budget):
        model = model_of("llama")
        cache = ShiftKVCache(model, budget=budget, **STORAGES[storage])
        with pytest.raises(ValueError, match="use_cache"):
            generate(model, cache, models.prompt_ids(1, 24), use_cache=False)

    def test_a_model_whose_config_says_so(self, monkeypatch):
        model = model_of("llama")
        monkeypatch.setattr(model.generation_config, "use_cache", False)
        with pytest.raises(ValueError, match="give use_cache=True"):
            generate(model, ShiftKVCache(model, budget=BUDGET), models.prompt_ids(1, 24))
        generate(model, ShiftKVCache(model, budget=BUDGET), models.prompt_ids(1, 24), use_cache=True)

    def test_no_cache_at_all_is_not_touched_by_ours(self):
        model, ids = model_of("llama"), models.prompt_ids(1, 24)
        ShiftKVCache(model, budget=BUDGET)
        assert generate(model, None, ids, use_cache=False).sequences.equal(generate(model, None, ids).sequences)


@pytest.mark.parametrize("storage", STORAGES)
def test_decoding_is_compiled_with_fixed_storage_alone(storage):
    model = models.text_model(num_hidden_layers=1)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    expected = generate(model, ShiftKVCache(model, budget=BUDGET), models.prompt_ids())
    cache = ShiftKVCache(model, budget=BUDGET, **STORAGES[storage])
    found = generate(model, cache, models.prompt_ids(), compile_config=config)
    assert counters["stats"]["unique_graphs"] == (1 if storage == "fixed" else 0)
    assert found.sequences.equal(expected.sequences)
    again = generate(model, ShiftKVCache(model, budget=BUDGET, **STORAGES[storage]), models.prompt_ids(1, 31))
    assert again.sequences.shape == (1, 31 + NEW_TOKENS)
    torch._dynamo.reset()


@pytest.mark.parametrize("storage", STORAGES)
def test_more_new_tokens_than_there_is_room_for_move_the_cache(storage, caplog):
    model, ids = model_of("llama"), models.prompt_ids(2, 24)
    more = {"max_new_tokens": 3 * NEW_TOKENS, "min_new_tokens": 3 * NEW_TOKENS}
    for budget in (1.0, BUDGET):
        expected = generate(model, ShiftKVCache(model, budget=budget), ids, **more)
        caplog.clear()
        cache = ShiftKVCache(model, budget=budget, **STORAGES[storage])
        found = generate(model, cache, ids, **more)
        assert found.sequences.equal(expected.sequences)
        assert_same(found.logits, expected.logits, storage)
        assert cache.get_seq_length() == 24 + 3 * NEW_TOKENS - 1
        moved = [record for record in caplog.records if record.name.startswith("mmshiftkv")]
        assert bool(moved) == (storage == "fixed")
