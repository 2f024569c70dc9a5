"""Keys, values and hidden states that are not finite, through the cache (finite.py) and its kernels."""

import contextlib
import copy
import warnings

import pytest
import torch

import models
from mmshiftkv import ShiftKVCache, make_cache
from mmshiftkv.finite import MESSAGE

PRESETS = ("published", "value-aware")
NUMBERS = (torch.nan, torch.inf, -torch.inf)
PLACES = {"keys": "self_attn.k_proj", "values": "self_attn.v_proj", "hidden states": "input_layernorm"}
LAST = 2  # the last layer: what is spoilt there spoils no other
NEW_TOKENS = 4


@contextlib.contextmanager
def broken(model, where, row, columns, number, layer=LAST, features=slice(3, 4)):
    """In passes with a prompt some features of these columns are `number`, in keys, values or hidden states."""

    def spoil(module, args, output):
        if output.shape[1] > 3:  # a new cache looks at three made-up tokens
            output = output.clone()
            output[row, columns, features] = number
        return output

    module = model.model.layers[layer].get_submodule(PLACES[where])
    handle = module.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def warned(times):
    """So many warnings come of numbers that are not finite."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [str(entry.message) for entry in caught if "finite" in str(entry.message)] == [MESSAGE] * times


def run(model, cache, inputs):
    """A pass with a prompt, with positions as `generate` counts them."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        inputs = {**inputs, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache


def step(model, cache, rows):
    with torch.no_grad():
        return model(models.prompt_ids(rows, 1, seed=9), past_key_values=cache, use_cache=True).logits


def new_cache(model, preset="value-aware", budget=9, **settings):
    return ShiftKVCache(model, budget=budget, preset=preset, **settings)


def assert_finite(cache):
    for index, layer in enumerate(cache.layers):
        for part in layer.allocated if hasattr(layer, "allocated") else (layer.keys, layer.values):
            assert part.isfinite().all(), f"layer {index}"


@pytest.mark.parametrize("reserved", [None, NEW_TOKENS])
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_token_that_is_not_finite_is_not_kept_and_other_rows_are_as_without_it(preset, where, number, reserved):
    model, inputs = models.text_model(), models.left_padded([40, 23])
    whole = run(model, new_cache(model, preset, max_new_tokens=reserved), inputs)
    column = whole.kept_indices(LAST)[1, 0, 3].item()  # one of the best of the head that has feature 3
    cache = new_cache(model, preset, max_new_tokens=reserved)
    with broken(model, where, 1, [column], number), warned(1):
        run(model, cache, inputs)
    kept = cache.kept_indices(LAST)
    # Votes see no values: there the token may stay, with zeros.
    assert (preset, where) == ("published", "values") or not (kept[1, 0] == column).any()
    assert (kept.diff(dim=-1) > 0).all()
    assert (kept[..., -1] == 39).all()
    assert (kept[1] >= 17).all()  # no padding instead of it
    assert_finite(cache)
    assert kept[0].equal(whole.kept_indices(LAST)[0])
    for mine, theirs in zip(cache.layers[LAST].allocated, whole.layers[LAST].allocated, strict=True):
        assert mine[0].equal(theirs[0])
    assert step(model, cache, 2).isfinite().all()


@pytest.mark.parametrize("reserved", [None, NEW_TOKENS])
@pytest.mark.parametrize("preset", PRESETS)
def test_hidden_states_that_are_not_finite_spoil_a_row_but_nothing_that_is_stored(preset, reserved):
    model, inputs = models.text_model(), models.left_padded([40, 23])
    whole, cache = (run(model, new_cache(model, preset, max_new_tokens=reserved), inputs) for _ in range(2))
    column = whole.kept_indices(1)[1, 0, 3].item()
    cache.reset()
    with broken(model, "hidden states", 1, [column], torch.nan, layer=1), warned(1):
        run(model, cache, inputs)
    assert_finite(cache)
    assert not (cache.kept_indices(1)[1] == column).any()
    for index in range(3):
        assert cache.kept_indices(index)[0].equal(whole.kept_indices(index)[0])
        for mine, theirs in zip(cache.layers[index].allocated, whole.layers[index].allocated, strict=True):
            assert mine[0].equal(theirs[0])
    # In the next layer all behind the token, which attend to it, are not finite.
    kept = cache.kept_indices(2)[1]
    assert (kept[:, -1] == 39).all()
    assert (kept[:, :6] < column).all() or column < 17 + 6


@pytest.mark.parametrize("preset", PRESETS)
def test_a_healthy_prompt_warns_of_nothing(preset):
    model = models.text_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What the model says of the cache's name is not this library's.
        warnings.filterwarnings("ignore", message=".*past_key_values.*")
        cache = run(model, new_cache(model, preset), models.left_padded([40, 23, 3]))
        step(model, cache, 3)
        cache.report()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_last_token_that_is_not_finite_is_kept_as_zeros(preset, where):
    model, inputs = models.text_model(), models.left_padded([40, 23])
    with broken(model, where, slice(None), [39], torch.nan, features=slice(None)), warned(1):
        cache = run(model, new_cache(model, preset), inputs)
    assert_finite(cache)
    assert (cache.kept_indices(LAST)[..., -1] == 39).all()
    keys, values = cache.layers[LAST].keys, cache.layers[LAST].values
    assert where == "values" or not keys[:, :, -1].any()
    # A finite key goes on giving: to its value a refit may add what is missing.
    assert where == "keys" or preset == "value-aware" or not values[:, :, -1].any()


@pytest.mark.parametrize("reserved", [None, NEW_TOKENS])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_prompt_without_finite_numbers_is_stored_as_zeros(preset, where, reserved):
    model, inputs = models.text_model(), models.left_padded([40, 23])
    with broken(model, where, slice(None), slice(None), torch.nan, features=slice(None)), warned(1):
        cache = run(model, new_cache(model, preset, max_new_tokens=reserved), inputs)
    assert_finite(cache)
    kept = cache.kept_indices(LAST)
    assert (kept[..., -1] == 39).all()
    assert (kept[1] >= 17).all()
    held = cache.layers[LAST].allocated
    for part, spoilt in zip(held, (where != "values", where != "keys"), strict=True):
        assert not (spoilt and part[:, :, :9].any())
    assert step(model, cache, 2).isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_that_is_not_finite_warns_of_nothing_and_changes_nothing(preset):
    model, inputs = models.text_model(), models.left_padded([40, 23, 5])
    expected = run(model, new_cache(model, preset), inputs)
    with broken(model, "keys", 2, slice(0, 35), torch.nan), broken(model, "values", 1, [3], torch.inf), warned(0):
        cache = run(model, new_cache(model, preset), inputs)
    assert_finite(cache)
    for index in range(3):
        assert cache.kept_indices(index).equal(expected.kept_indices(index))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_prompt_warns_for_itself(preset):
    model, ids = models.text_model(), {"input_ids": models.prompt_ids(2)}
    cache = new_cache(model, preset)
    with broken(model, "keys", 0, [4, 11], torch.nan):
        for layer in (0, 1):  # several layers at once
            with broken(model, "values", 1, [7], torch.inf, layer=layer), warned(1):
                run(model, cache, ids)
                step(model, cache, 2)
                cache.report()
                twin = copy.deepcopy(cache)
                step(model, twin, 2)
                twin.report()
            cache.reset()
    with warned(0):
        run(model, cache, ids)
        cache.report()


@pytest.mark.parametrize("preset", PRESETS)
def test_chunks_and_generate_warn_once(preset):
    model, inputs = models.text_model(), models.left_padded([40, 23])
    for options in ({}, {"prefill_chunk_size": 16}, {"num_beams": 2}):
        cache = new_cache(model, preset)
        with broken(model, "keys", 1, [-1], torch.nan), warned(1):
            model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
        for layer in cache.layers:
            assert layer.keys[:, :, :9].isfinite().all()
            assert layer.values[:, :, :9].isfinite().all()


def test_a_copy_made_while_a_prompt_comes_warns_of_its_own_end():
    model, ids = models.text_model(), models.prompt_ids()
    cache = new_cache(model, prefill="chunked", prompt_length=40)
    with warned(0):
        run(model, cache, {"input_ids": ids[:, :20]})
        twin = copy.deepcopy(cache)
    with broken(model, "keys", 0, [4], torch.nan), warned(1):
        run(model, twin, {"input_ids": ids[:, 20:]})
    with warned(0):
        run(model, cache, {"input_ids": ids[:, 20:]})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_budget_that_covers_the_prompt_leaves_it_as_it_is(preset):
    """As with DynamicCache: nothing is selected, and nothing looked at."""
    model, ids = models.text_model(), {"input_ids": models.prompt_ids()}
    with broken(model, "keys", 0, [4], torch.nan), warned(0):
        cache = run(model, new_cache(model, preset, budget=40), ids)
    assert cache.layers[LAST].keys.isnan().any()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("keydiff", {}), ("snapkv", {"window": 3}), ("expected_attention", {}), ("streaming_llm", {}), ("random", {})],
)
def test_other_methods_store_nothing_that_is_not_finite(name, settings):
    model, inputs = models.text_model(), models.left_padded([40, 23])
    with broken(model, "keys", 1, [30], torch.nan), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = run(model, make_cache(name, model, 9, **settings), inputs)
    assert_finite(cache)
