"""Every public method and property of transformers' `DynamicCache` does on our caches what it does there.

The names are read off the installed version: one that is new there, and not in the tables below, fails by its name.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

import models
from caches import (
    FAMILIES,
    FAMILIES_AND_STORAGES,
    STORAGES,
    assert_same,
    contents,
    covering,
    dynamic,
    filled,
    forward,
    model_of,
    public_names,
)
from mmshiftkv import ShiftKVCache

ROWS, TOKENS = 2, 20


def refuses(call):
    """Whether a call raises a ValueError."""
    try:
        call()
    except ValueError:
        return True
    return False


def states(tokens):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(ROWS, 2, tokens, 16, generator=generator), torch.randn(ROWS, 2, tokens, 16, generator=generator)


def iterated(cache, model):
    # Fixed storage shows its empty slots too.
    return [(keys[:, :, :TOKENS], values[:, :, :TOKENS], window) for keys, values, window in cache]


def emptied(cache, model):
    """The cache after `reset`; before 5.18 a DynamicCache is not empty then, but full of zeros."""
    if type(cache) is DynamicCache:
        return dynamic(model)
    cache.reset()
    return cache


def initialized_early(cache, model):
    cache = emptied(cache, model)
    cache.early_initialization(ROWS, 2, 16, torch.float32, torch.device("cpu"))
    early = [cache.is_initialized, int(cache.get_seq_length())]
    return early, contents(filled(model, cache, models.prompt_ids(ROWS, 9)))


def recorded(cache, model):
    cache.activate_past_recording()
    forward(model, cache, models.prompt_ids(ROWS, 5, seed=1))
    cache.crop(-4)
    forward(model, cache, models.prompt_ids(ROWS, 3, seed=2))
    cache.crop(-1)
    return contents(cache)


def reset(cache, model):
    cache = emptied(cache, model)
    empty = int(cache.get_seq_length())
    return empty, contents(filled(model, cache, models.prompt_ids(ROWS, 7, seed=2)))


def after(change):
    """What a cache holds after a change, how long it says it is, and the logits of two tokens more."""

    def result(cache, model):
        change(cache)
        rows = contents(cache)[0][0].shape[0]
        held, seen = contents(cache), int(cache.get_seq_length())
        return held, seen, forward(model, cache, models.prompt_ids(rows, 2, seed=3)).logits

    return result


def selected(cache, model):
    kinds = {"tensor": torch.tensor([1]), "list": [1, 0], "tuple": (1,), "mask": torch.tensor([False, True])}
    return {
        kind: after(lambda each, rows=rows: each.batch_select_indices(rows))(copy.deepcopy(cache), model)
        for kind, rows in kinds.items()
    }


def updated(cache, model):
    attended = [cache.update(*states(3), index) for index in range(len(cache))]
    return [(keys[:, :, : TOKENS + 3], values[:, :, : TOKENS + 3]) for keys, values in attended], contents(cache)


# Name -> what is compared: called with a cache that holds `ROWS` prompts of `TOKENS` tokens, and its model.
EXERCISED = {
    "__iter__": iterated,
    "__len__": lambda cache, model: len(cache),
    "activate_past_recording": recorded,
    "batch_repeat_interleave": after(lambda cache: cache.batch_repeat_interleave(3)),
    "batch_select_indices": selected,
    "batch_size": lambda cache, model: cache.batch_size,
    "crop": after(lambda cache: cache.crop(-5)),
    "early_initialization": initialized_early,
    "get_conv_state": lambda cache, model: refuses(lambda: cache.get_conv_state(0)),
    "get_mask_sizes": lambda cache, model: cache.get_mask_sizes(3, 0),
    "get_max_length": lambda cache, model: [cache.get_max_length(), cache.get_max_length(0), cache.get_max_length(99)],
    "get_query_offset": lambda cache, model: int(cache.get_query_offset()),
    "get_recurrent_state": lambda cache, model: refuses(lambda: cache.get_recurrent_state(0)),
    "get_seq_length": lambda cache, model: [int(cache.get_seq_length(index)) for index in (0, 1, 99)],
    "has_previous_state": lambda cache, model: [refuses(cache.has_previous_state), cache.has_previous_state(99)],
    "is_compileable": lambda cache, model: cache.is_compileable,
    "is_croppable": lambda cache, model: cache.is_croppable,
    "is_dummy": lambda cache, model: cache.is_dummy,
    "is_initialized": lambda cache, model: cache.is_initialized,
    "is_linear": lambda cache, model: cache.is_linear,
    "is_recording_past": lambda cache, model: cache.is_recording_past(0),
    "is_sliding": lambda cache, model: cache.is_sliding,
    "layer_class_to_replicate": lambda cache, model: cache.layer_class_to_replicate is None,
    "layers": lambda cache, model: [layer.is_initialized for layer in cache.layers],
    "offloading": lambda cache, model: cache.offloading,
    "reorder_cache": after(lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
    "reset": reset,
    "update": updated,
    "update_conv_state": lambda cache, model: refuses(lambda: cache.update_conv_state(states(1)[0], 0)),
    "update_indexer": lambda cache, model: refuses(lambda: cache.update_indexer(states(1)[0], 0)),
    "update_recurrent_state": lambda cache, model: refuses(lambda: cache.update_recurrent_state(states(1)[0], 0)),
    # Deprecated, and gone from later versions.
    "get_max_cache_shape": lambda cache, model: cache.get_max_cache_shape(),
    "max_batch_size": lambda cache, model: cache.max_batch_size,
    "max_cache_len": lambda cache, model: cache.max_cache_len,
}
# Name -> why it is not offered.
NOT_OFFERED = {
    "offload": "what is left of a compressed cache is small; no argument of ours turns offloading on",
    "prefetch": "brings back what was offloaded",
}
# Name -> why our caches answer in another way; each has a test below.
OTHERWISE = {"__repr__": "names our classes"}
# The same, with fixed storage alone.
OTHERWISE_FIXED = {"get_mask_sizes": "attention sees all slots", "is_compileable": "fixed storage is for compiling"}


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """Deprecated names warn."""


# What moves states is compared on every family, the rest on one.
MOVES_STATES = ("activate_past_recording", "batch_select_indices", "crop", "reorder_cache", "reset", "update")


def names_to_compare(family, storage):
    names = [name for name in public_names(DynamicCache()) if name in EXERCISED]
    if family != "llama":
        names = [name for name in names if name in MOVES_STATES]
    if storage == "fixed":
        names = [name for name in names if name not in OTHERWISE_FIXED]
    if "layer_types" in FAMILIES[family]:
        names.remove("crop")  # a sliding window that has moved on cannot be cropped, in either cache
    return names


@pytest.mark.parametrize("name", public_names(DynamicCache()))
def test_every_public_name_is_known(name):
    tables = [EXERCISED, NOT_OFFERED, OTHERWISE]
    assert sum(name in table for table in tables) == 1, (
        f"DynamicCache.{name} of the installed transformers is in none of the tables: compare it, or say why not"
    )


@pytest.mark.parametrize(
    ("family", "storage", "name"),
    [
        pytest.param(family, storage, name, id=f"{family}-{storage}-{name}")
        for family, storage in FAMILIES_AND_STORAGES
        for name in names_to_compare(family, storage)
    ],
)
def test_a_covering_budget_does_as_a_dynamic_cache(family, storage, name):
    model, ids = model_of(family), models.prompt_ids(ROWS, TOKENS)
    cache, plain = filled(model, covering(model, storage), ids), filled(model, dynamic(model), ids)
    assert_same(EXERCISED[name](cache, model), EXERCISED[name](plain, model), storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_calls_before_the_prompt_do_as_on_a_dynamic_cache(storage):
    model = model_of("llama")
    for name in ("get_seq_length", "get_mask_sizes", "is_initialized", "is_croppable", "batch_size", "get_max_length"):
        cache = covering(model, storage)
        assert_same(EXERCISED[name](cache, model), EXERCISED[name](dynamic(model), model))
    for change in (
        lambda cache: cache.crop(0),
        lambda cache: cache.reorder_cache(torch.tensor([0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reset(),
    ):
        cache = covering(model, storage)
        change(cache)
        plain = filled(model, dynamic(model), models.prompt_ids(1, 9))
        assert_same(contents(filled(model, cache, models.prompt_ids(1, 9))), contents(plain))


def test_a_printed_cache_names_its_classes():
    model = model_of("llama")
    found = repr(filled(model, ShiftKVCache(model, budget=4), models.prompt_ids()))
    assert found == "ShiftKVCache(layers=[GrowingLayer, GrowingLayer])"
    fixed = filled(model, covering(model, "fixed"), models.prompt_ids())
    assert repr(fixed) == "ShiftKVCache(layers=[StaticLayer, StaticLayer])"


def test_fixed_storage_shows_attention_all_slots_and_may_be_compiled():
    model = model_of("llama")
    cache = ShiftKVCache(model, budget=4, max_new_tokens=10)
    assert cache.is_compileable
    filled(model, cache, models.prompt_ids())
    assert cache.is_compileable
    assert cache.get_mask_sizes(1, 0) == (4 + 10, 40 - 4)


def test_candidates_behind_a_prompt_are_known_from_generate_alone():
    """A loop of one's own prefills the prompt first: of a pass that holds both, nobody says where the prompt ends."""
    model = model_of("llama")
    cache = ShiftKVCache(model, budget=4)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="prefill the prompt before it"):
        forward(model, cache, models.prompt_ids())
    cache.reset()
    filled(model, cache, models.prompt_ids())
    cache.activate_past_recording()
    forward(model, cache, models.prompt_ids(1, 5))
    cache.crop(-3)
    assert cache.layers[0].stored == 4 + 2


def test_offloading_cannot_be_asked_for():
    with pytest.raises(TypeError, match="offloading"):
        ShiftKVCache(model_of("llama"), budget=4, offloading=True)


def test_states_of_linear_attention_pass_through():
    """Layers of convolutions are transformers' own, and their states are reached through our cache."""
    model = models.text_model("lfm2", layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)
    cache, plain = ShiftKVCache(model, budget=5), dynamic(model)
    assert not cache.has_previous_state()
    for each in (cache, plain):
        filled(model, each, models.prompt_ids())
    assert cache.has_previous_state()
    assert cache.is_linear == plain.is_linear == [True, False, True]
    assert cache.layers[0].conv_states[0].equal(plain.layers[0].conv_states[0])
    assert cache.get_seq_length() == plain.get_seq_length() == 40
