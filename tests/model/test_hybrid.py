"""Layers that are not plain full attention stay as DynamicCache makes them."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import models
from mmshiftkv import ShiftKVCache
from mmshiftkv.storage.growing import GrowingLayer


@pytest.fixture(params=models.HYBRIDS)
def model(request):
    return models.text_model(request.param, **models.HYBRIDS[request.param])


def greedy(model, cache, inputs):
    return model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def test_a_covering_budget_gives_the_logits_of_a_dynamic_cache(model):
    for inputs in ({"input_ids": models.prompt_ids()}, models.left_padded([40, 9])):
        expected = greedy(model, DynamicCache(config=model.config), inputs)
        found = greedy(model, ShiftKVCache(model, budget=40), inputs)
        assert all(mine.equal(theirs) for mine, theirs in zip(found.logits, expected.logits, strict=True))


def test_only_full_attention_is_compressed(model):
    plain, cache = DynamicCache(config=model.config), ShiftKVCache(model, budget=5)
    inputs = {"input_ids": models.prompt_ids()}
    greedy(model, plain, inputs)
    greedy(model, cache, inputs)
    selected = [index for index, layer in enumerate(plain.layers) if type(layer) is DynamicLayer]
    for index, (layer, other) in enumerate(zip(cache.layers, plain.layers, strict=True)):
        if index in selected:
            assert isinstance(layer, GrowingLayer)
            assert layer.stored == 5 + 7
            assert cache.kept_indices(index).shape == (1, 2, 5)
        else:
            assert type(layer) is type(other)
            assert cache.kept_indices(index) is None
    assert cache.get_seq_length(selected[0]) == 47
    for row in cache.report().layers:
        assert row.selected == (row.index in selected)
        if not row.selected:
            assert row.bytes_stored == row.bytes_full
            assert (row.bytes_stored > 0) == (type(plain.layers[row.index]).__name__ != "DummyLayer")
    assert "* not compressed" in str(cache.report())


def test_reset_makes_a_hybrid_cache_like_new(model):
    inputs = {"input_ids": models.prompt_ids()}
    expected = greedy(model, ShiftKVCache(model, budget=5), inputs)
    cache = ShiftKVCache(model, budget=5)
    greedy(model, cache, {"input_ids": models.prompt_ids(1, 25, seed=8)})
    cache.reset()
    assert greedy(model, cache, inputs).sequences.equal(expected.sequences)


def test_a_failed_prefill_empties_every_layer(model):
    cache = ShiftKVCache(model, budget=5)

    def fail(*_):
        raise ArithmeticError("planted")

    handle = model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError), torch.no_grad():
        model(models.prompt_ids(), past_key_values=cache, use_cache=True)
    handle.remove()
    assert models.hooks_on(model) == 0
    inputs = {"input_ids": models.prompt_ids()}
    expected = greedy(model, ShiftKVCache(model, budget=5), inputs)
    assert greedy(model, cache, inputs).sequences.equal(expected.sequences)
