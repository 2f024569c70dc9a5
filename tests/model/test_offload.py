"""Models whose weights accelerate brings in, from memory or from disk, only while a module runs."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

import models
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, join, make_cache

BUDGET, WAYS = 7, ("memory", "disk", "device_map")


def offloaded(model, way, folder):
    """The same model with all weights in memory or on disk, or with two of three blocks on disk."""
    if way == "memory":
        return cpu_offload(copy.deepcopy(model), execution_device="cpu")
    if way == "disk":
        return disk_offload(copy.deepcopy(model), folder / "weights", execution_device="cpu")
    model.save_pretrained(folder / "model")
    devices = dict.fromkeys(("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    devices |= {f"model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=devices, offload_folder=folder / "weights", dtype="float32"
    )


def generate(model, cache, ids=None):
    ids = models.prompt_ids() if ids is None else ids
    return model.generate(ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=8, do_sample=False)


def is_away(model):
    return any(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("method", ["shiftkv", "snapkv", "expected_attention"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_an_offloaded_model_generates_what_it_does_without(model_type, way, method, tmp_path):
    model, settings = models.text_model(model_type), {"window": 3} if method == "snapkv" else {}
    expected = make_cache(method, model, BUDGET, **settings)
    tokens = generate(model, expected)
    away = offloaded(model, way, tmp_path)
    assert is_away(away)
    cache = make_cache(method, away, BUDGET, **settings)
    assert generate(away, cache).equal(tokens)
    for layer in range(3):
        assert cache.kept_indices(layer).equal(expected.kept_indices(layer))
        assert cache.layers[layer].keys.equal(expected.layers[layer].keys)
        assert cache.layers[layer].values.equal(expected.layers[layer].values)
    assert is_away(away)


@pytest.mark.parametrize("way", WAYS)
def test_caches_are_saved_loaded_and_joined(way, tmp_path):
    model = models.text_model()
    away = offloaded(model, way, tmp_path)
    caches = [ShiftKVCache(one, budget=BUDGET) for one in (model, away)]
    ids = torch.cat([generate(model, caches[0]), models.prompt_ids(1, 5, seed=5)], dim=1)
    generate(away, caches[1])
    for name, cache in zip(("here", "away"), caches, strict=True):
        cache.save(tmp_path / name)
    both = [join([cache, cache]) for cache in caches]
    expected = generate(model, caches[0], ids)
    assert all(
        generate(one, ShiftKVCache.load(tmp_path / name, one), ids).equal(expected)
        for one in (model, away)
        for name in ("here", "away")
    )
    assert generate(away, both[1], ids.expand(2, -1)).equal(generate(model, both[0], ids.expand(2, -1)))
    with pytest.raises(ValueError, match="saved with another model: its weights differ"):
        ShiftKVCache.load(tmp_path / "away", models.text_model(seed=1))
    assert is_away(away)


def test_offloaded_weights_are_not_decoded_with_in_fixed_storage():
    away = cpu_offload(models.text_model(), execution_device="cpu")
    with pytest.warns(UserWarning, match="the weights are offloaded, or on several devices"):
        cache = ShiftKVCache(away, budget=BUDGET, max_new_tokens=5)
    assert not cache.is_compileable
    with torch.no_grad():
        for tokens in (40, 1, 1):
            away(models.prompt_ids(1, tokens), **{CACHE_ARGUMENT: cache}, use_cache=True)
    assert cache.report().tokens_stored == 9
