"""Models, caches and calls that the tests of transformers' cache interface share."""

import functools
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import models
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache
from mmshiftkv.storage.base import SelectedLayer
from mmshiftkv.storage.windows import WindowLayer

NEW_TOKENS = 6
LAYERS = 2

# Model type -> what its config needs besides the common shape.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
STORAGES: dict[str, dict[str, Any]] = {"growing": {}, "fixed": {"max_new_tokens": NEW_TOKENS}}
FAMILIES_AND_STORAGES = [(family, storage) for family in FAMILIES for storage in STORAGES]


@functools.cache
def model_of(family: str, layers: int = LAYERS, attention: str = "sdpa") -> PreTrainedModel:
    """A tiny model, built once; no test changes it."""
    return models.text_model(family, attention=attention, num_hidden_layers=layers, **FAMILIES.get(family, {}))


def dynamic(model: PreTrainedModel) -> DynamicCache:
    """What transformers would use."""
    return DynamicCache(config=model.config)


def forward(model: PreTrainedModel, cache: Any, ids: torch.Tensor, **inputs: Any) -> Any:
    """One forward pass."""
    with torch.no_grad():
        return model(ids, **inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)


def filled(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> Any:
    """The cache, after one forward pass."""
    forward(model, cache, ids)
    return cache


def generate(model: PreTrainedModel, cache: Any, inputs: Any, **options: Any) -> Any:
    """`NEW_TOKENS` tokens, with their logits; sampling begins with the same random state each time."""
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    torch.manual_seed(3)
    return model.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        **{
            "do_sample": False,
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "return_dict_in_generate": True,
            "output_logits": True,
            **options,
        },
    )


def contents(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of the keys and values of each layer, without slots that are not filled."""
    held = []
    for layer in cache.layers:
        stored = layer.stored if isinstance(layer, SelectedLayer | WindowLayer) else layer.keys.shape[2]
        held.append((layer.keys[:, :, :stored].clone(), layer.values[:, :, :stored].clone()))
    return held


def covering(model: PreTrainedModel, storage: str) -> ShiftKVCache:
    """A cache that drops nothing."""
    return ShiftKVCache(model, budget=1.0, **STORAGES[storage])


def assert_same(found: Any, expected: Any, storage: str = "growing") -> None:
    """Equal to the bit; with fixed storage up to rounding: attention over masked slots sums in another order."""
    tolerance = {"growing": 0.0, "fixed": 1e-4}[storage]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def public_names(instance: Any) -> list[str]:
    """The public methods, properties and attributes of an object, and the special methods that its classes define."""
    classes = [each for each in type(instance).__mro__ if each.__module__.startswith("transformers.")]
    special = {
        name
        for each in classes
        for name, value in vars(each).items()
        if name.startswith("__") and callable(value) and name not in ("__init__", "__init_subclass__", "__class__")
    }
    return sorted(special | {name for name in dir(instance) if not name.startswith("_")})
