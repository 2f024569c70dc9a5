"""Every public method and attribute of transformers' `DynamicLayer` does on our layers what it does there.

The names are read off the installed version: one that is new there, and not in the tables below, fails by its name.
"""

import copy

import pytest
import torch

import models
from caches import STORAGES, assert_same, contents, covering, dynamic, filled, forward, model_of, public_names
from mmshiftkv.storage.growing import GrowingLayer

ROWS, TOKENS = 2, 20


def states(tokens, rows=ROWS):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(rows, 2, tokens, 16, generator=generator), torch.randn(rows, 2, tokens, 16, generator=generator)


def after(change):
    """What the layer holds after a change, and the logits of two tokens more: the model has no other layer."""

    def result(cache, model):
        change(cache.layers[0])
        rows = cache.layers[0].keys.shape[0]
        seen = int(cache.layers[0].get_seq_length())
        return contents(cache), seen, forward(model, cache, models.prompt_ids(rows, 2, seed=3)).logits

    return result


def selected(cache, model):
    kinds = {"tensor": torch.tensor([1]), "list": [1, 0], "tuple": (1,), "mask": torch.tensor([False, True])}
    return {
        kind: after(lambda layer, rows=rows: layer.batch_select_indices(rows))(copy.deepcopy(cache), model)
        for kind, rows in kinds.items()
    }


def updated(cache, model):
    keys, values = cache.layers[0].update(*states(3))
    return keys[:, :, : TOKENS + 3], values[:, :, : TOKENS + 3], contents(cache)


def initialized(cache, model):
    layer = (
        covering(model, "growing").layers[0] if isinstance(cache.layers[0], GrowingLayer) else type(cache.layers[0])()
    )
    empty = layer.is_initialized
    layer.lazy_initialization(*states(0))
    return [empty, layer.is_initialized, layer.get_seq_length(), layer.update(*states(4))]


# Name -> what is compared: called with a cache of one layer that holds `ROWS` prompts of `TOKENS`, and its model.
EXERCISED = {
    "batch_repeat_interleave": after(lambda layer: layer.batch_repeat_interleave(2)),
    "batch_select_indices": selected,
    "crop": after(lambda layer: layer.crop(-5)),
    "device": lambda cache, model: cache.layers[0].device.type == "cpu",
    "get_mask_sizes": lambda cache, model: cache.layers[0].get_mask_sizes(3),
    "get_max_length": lambda cache, model: cache.layers[0].get_max_length(),
    "get_seq_length": lambda cache, model: int(cache.layers[0].get_seq_length()),
    "is_compileable": lambda cache, model: cache.layers[0].is_compileable,
    "is_croppable": lambda cache, model: cache.layers[0].is_croppable,
    "is_initialized": lambda cache, model: cache.layers[0].is_initialized,
    "is_sliding": lambda cache, model: cache.layers[0].is_sliding,
    "keys": lambda cache, model: cache.layers[0].keys[:, :, :TOKENS],
    "lazy_initialization": initialized,
    "reorder_cache": after(lambda layer: layer.reorder_cache(torch.tensor([1, 0]))),
    "supports_early_init": lambda cache, model: cache.layers[0].supports_early_init,
    "update": updated,
    "values": lambda cache, model: cache.layers[0].values[:, :, :TOKENS],
    # Gone from later versions.
    "dtype": lambda cache, model: cache.layers[0].dtype == torch.float32,
    "get_max_cache_shape": lambda cache, model: cache.layers[0].get_max_cache_shape(),
}
# Name -> why it is not offered.
NOT_OFFERED = {
    "offload": "what is left of a compressed cache is small; no argument of ours turns offloading on",
    "prefetch": "brings back what was offloaded",
}
# Name -> why our layers answer in another way; each has a test below.
OTHERWISE = {
    "__repr__": "names our classes",
    "reset": "a prompt is the cache's, not a layer's: the cache puts a new layer in the place of each",
}
# The same, with fixed storage alone.
OTHERWISE_FIXED = {
    "get_mask_sizes": "attention sees all slots",
    "is_compileable": "fixed storage is for compiling",
    "lazy_initialization": "the slots are there when the layer is made, at the end of its prompt",
}


def installed_names():
    model = model_of("llama", layers=1)
    return public_names(filled(model, dynamic(model), models.prompt_ids(1, 3)).layers[0])


@pytest.mark.parametrize("name", installed_names())
def test_every_public_name_is_known(name):
    tables = [EXERCISED, NOT_OFFERED, OTHERWISE]
    assert sum(name in table for table in tables) == 1, (
        f"DynamicLayer.{name} of the installed transformers is in none of the tables: compare it, or say why not"
    )


@pytest.mark.parametrize(
    ("storage", "name"),
    [
        pytest.param(storage, name, id=f"{storage}-{name}")
        for storage in STORAGES
        for name in installed_names()
        if name in EXERCISED and not (storage == "fixed" and name in OTHERWISE_FIXED)
    ],
)
def test_a_layer_that_dropped_nothing_does_as_a_dynamic_layer(storage, name):
    model, ids = model_of("llama", layers=1), models.prompt_ids(ROWS, TOKENS)
    cache, plain = filled(model, covering(model, storage), ids), filled(model, dynamic(model), ids)
    assert_same(EXERCISED[name](cache, model), EXERCISED[name](plain, model), storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_layer_by_itself_is_not_reset(storage):
    model = model_of("llama", layers=1)
    cache = filled(model, covering(model, storage), models.prompt_ids())
    with pytest.raises(RuntimeError, match=r"call reset\(\) of the cache"):
        cache.layers[0].reset()
    assert cache.get_seq_length() == 40


def test_a_layer_with_fixed_storage_shows_attention_all_slots():
    model = model_of("llama", layers=1)
    cache = filled(model, covering(model, "fixed"), models.prompt_ids(ROWS, TOKENS))
    layer = cache.layers[0]
    assert repr(layer) == "StaticLayer"
    assert layer.is_compileable
    assert layer.get_mask_sizes(1) == (layer.slots, 0) == (TOKENS + STORAGES["fixed"]["max_new_tokens"], 0)
    assert layer.keys.shape == (ROWS, 2, layer.slots, 16)


def test_a_layer_of_another_kind_of_model_keeps_its_own_shape():
    """Multi-head and multi-query attention, and keys of another size than the hidden states' share."""
    for changes in ({"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 24}):
        model = models.text_model(num_hidden_layers=1, **changes)
        cache = filled(model, covering(model, "growing"), models.prompt_ids(3, 5))
        assert cache.layers[0].keys.shape == (3, changes.get("num_key_value_heads", 2), 5, changes.get("head_dim", 16))
