"""Storage of a layer and what may be done to it after the selection."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from mmshiftkv import ShiftKVCache
from mmshiftkv.storage.growing import GrowingLayer


def states(rows=2, tokens=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 4, generator=generator), torch.randn(rows, 2, tokens, 4, generator=generator)


def compressed(model, budget=6, rows=2, **settings):
    cache = ShiftKVCache(model, budget=budget, **settings)
    with torch.no_grad():
        model(models.prompt_ids(rows), past_key_values=cache, use_cache=True)
    return cache


@pytest.fixture(scope="module")
def model():
    return models.text_model()


@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_what_is_appended_in_pieces_is_stored_in_order(pieces):
    keys, values = states(tokens=sum(pieces))
    layer = GrowingLayer()
    for part_keys, part_values in zip(keys.split(pieces, dim=2), values.split(pieces, dim=2), strict=True):
        found = layer.update(part_keys, part_values)
    assert found[0].equal(keys)
    assert found[1].equal(values)
    assert layer.stored == layer.get_seq_length() == sum(pieces)
    assert layer.get_mask_sizes(2) == (sum(pieces) + 2, 0)


def test_storage_grows_in_steps_and_not_with_every_token():
    layer = GrowingLayer()
    layer.update(*states(tokens=8))
    assert layer.allocated_bytes == layer.bytes_per_token * 8
    addresses = set()
    for _ in range(600):
        layer.update(*states(tokens=1))
        addresses.add(layer.allocated[0].data_ptr())
    assert len(addresses) < 12
    assert layer.allocated_bytes < 1.4 * 608 * layer.bytes_per_token


def test_fixed_storage_stays_in_place(model):
    cache = compressed(model, max_new_tokens=50)
    before = [layer.allocated[0].data_ptr() for layer in cache.layers]
    with torch.no_grad():
        for _ in range(50):
            model(models.prompt_ids(2, 1), past_key_values=cache, use_cache=True)
    assert [layer.allocated[0].data_ptr() for layer in cache.layers] == before
    assert cache.report().bytes_stored == 3 * 56 * cache.layers[0].bytes_per_token


def test_the_prompt_is_let_go_layer_by_layer(model):
    """While a layer is prefilled, nothing as long as the prompt is alive of the layers before it."""
    long = []

    def remember(module, args, kwargs):
        alive = [reference() for reference in long]
        assert all(tensor is None for tensor in alive), [tensor.shape for tensor in alive if tensor is not None]

    cache = ShiftKVCache(model, budget=6)
    update = cache.update

    def watched(keys, values, layer_idx, *args, **kwargs):
        found = update(keys, values, layer_idx, *args, **kwargs)
        long.extend(map(weakref.ref, (keys, values, *found)))
        return found

    cache.update = watched
    handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in model.model.layers[1:]] + [
        model.model.norm.register_forward_pre_hook(remember, with_kwargs=True)
    ]
    with torch.no_grad():
        model(models.prompt_ids(2), past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    assert len(long) == 12
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes == 2 * 2 * 6 * 16 * 4
        assert layer.kept_indices.untyped_storage().nbytes() <= 2 * 2 * 6 * 8


def test_nothing_of_the_hidden_states_stays(model):
    hidden = []
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: hidden.append(weakref.ref(kwargs["hidden_states"])), with_kwargs=True
    )
    for settings_ in ({}, {"prefill": "chunked"}, {"prefill": "chunked", "prompt_length": 40}):
        compressed(model, **settings_)
    handle.remove()
    gc.collect()
    assert all(reference() is None for reference in hidden)


def test_rows_may_be_reordered_repeated_and_chosen(model):
    rows = torch.tensor([1, 1, 0])
    changes = {
        "reorder_cache": (lambda cache: cache.reorder_cache(rows), lambda part: part[rows]),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda part: part[[1]]),
        "mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False])), lambda part: part[:1]),
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda part: part.repeat_interleave(2, dim=0)),
    }
    for budget in (6, 40):
        for change, expected in changes.values():
            before, after = compressed(model, budget), compressed(model, budget)
            change(after)
            for old, new in zip(before.layers, after.layers, strict=True):
                assert new.keys.equal(expected(old.keys))
                assert new.values.equal(expected(old.values))
                assert new.kept_indices.equal(expected(old.kept_indices))
            assert after.get_seq_length() == 40
            with torch.no_grad():
                model(models.prompt_ids(after.layers[0].keys.shape[0], 2), past_key_values=after, use_cache=True)


def test_rows_of_a_chunked_prompt_are_selected_from_first(model):
    cache, expected = compressed(model, prefill="chunked"), compressed(model)
    cache.batch_repeat_interleave(3)
    expected.batch_repeat_interleave(3)
    assert cache.kept_indices(1).equal(expected.kept_indices(1))


def test_crop_takes_back_what_came_after_the_prompt(model):
    cache, expected = compressed(model), compressed(model)
    more = models.prompt_ids(2, 5)
    with torch.no_grad():
        model(more, past_key_values=cache, use_cache=True)
        cache.crop(-3)
        model(more[:, :2], past_key_values=expected, use_cache=True)
        found, wanted = (model(more[:, :1], past_key_values=each, use_cache=True).logits for each in (cache, expected))
    assert cache.get_seq_length() == 43
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_crop_into_a_compressed_prompt_is_refused_and_changes_nothing(model):
    cache = compressed(model)
    with torch.no_grad():
        model(models.prompt_ids(2, 5), past_key_values=cache, use_cache=True)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(
        ValueError, match=r"tokens_to_remove=-6: only 5 tokens can be removed, the prompt .* compressed"
    ):
        cache.crop(-6)
    with pytest.raises(ValueError, match="tokens_to_remove=3 must be negative"):
        cache.crop(3)
    assert cache.get_seq_length() == 45
    assert all(layer.keys.equal(old) for layer, old in zip(cache.layers, before, strict=True))
    cache.crop(0)
    cache.crop(-5)
    assert cache.get_seq_length() == 40


def test_crop_into_a_prompt_that_is_stored_whole(model):
    cache = compressed(model, budget=40)
    cache.crop(-15)
    assert cache.get_seq_length() == 25
    assert cache.kept_indices(0).equal(torch.arange(25).expand(2, 2, -1))
    with pytest.raises(ValueError, match="only 25 tokens can be removed, no more are stored"):
        cache.crop(-26)
    cache.crop(-25)
    assert cache.kept_indices(0) is None


def test_another_batch_size_is_refused(model):
    cache = compressed(model)
    with pytest.raises(ValueError, match=r"batch size 3, the cache holds 2 rows; call reset\(\)"), torch.no_grad():
        model(models.prompt_ids(3, 2), past_key_values=cache, use_cache=True)


def test_an_unused_cache_takes_every_call(model):
    cache = ShiftKVCache(model, budget=6)
    cache.reset()
    cache.crop(0)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.get_seq_length() == 0
    assert cache.kept_indices(2) is None
    assert cache.report().bytes_stored == 0
    assert not cache.is_compileable


@pytest.mark.parametrize("layer", [-1, 3, "0", True, 1.0])
def test_kept_indices_of_no_layer_are_refused(model, layer):
    with pytest.raises(ValueError, match="must be an int from 0 to 2"):
        ShiftKVCache(model, budget=6).kept_indices(layer)
