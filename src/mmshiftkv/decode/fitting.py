"""Which models can be decoded block by block, with one compilation for all blocks and one recording of a step."""

import ast
import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..cache import PrefillSelectionCache
from ..model.asking import CACHES
from ..model.hooks import has_foreign_hooks
from .block_cache import is_fixed
from .twin import NUMBER, modules_of_step, path_to_blocks

# Their factors are computed anew in a step, from numbers that are read off the device or in buffers that are replaced.
_MOVING_ROTATIONS = ("dynamic", "longrope")
_CACHES = (*CACHES, "cache_params")  # the last one in layers of linear attention


def obstacle_to_blocks(model: PreTrainedModel, cache: PrefillSelectionCache, inputs: dict[str, Any]) -> str | None:
    """Why a model's step has to be compiled as a whole; None where its blocks can be compiled by themselves.

    Args:
        model: the model.
        cache: with a prompt.
        inputs: of a step of one token, as `prepare_inputs_for_generation` makes them.
    """
    blocks = cache.decoder.blocks
    path = path_to_blocks(model, blocks)
    if path is None:
        return "the decoder blocks are in no list of the model"
    if len(cache.layers) != len(blocks) or not all(is_fixed(layer) for layer in cache.layers):
        return "not every decoder block has a layer of the cache to itself, in storage that stays"
    return (
        _obstacle_in_model(model, cache.decoder.text_config)
        or _obstacle_in_inputs(inputs)
        or _obstacle_in_modules(modules_of_step(model, path))
    )


def _obstacle_in_model(model: PreTrainedModel, text_config: Any) -> str | None:
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers does not compile the model's step in one piece"
    if getattr(model, "hf_quantizer", None) is not None:
        return "the weights are quantized"
    if len({*getattr(model, "hf_device_map", {}).values()}) > 1:
        return "the weights are on several devices"
    if hasattr(text_config, "num_kv_shared_layers"):
        return "blocks share keys and values"
    if any(kind in _MOVING_ROTATIONS for kind in _strings_in(getattr(text_config, "rope_parameters", None))):
        return "rotary factors are computed anew in a step"
    return None


def _obstacle_in_inputs(inputs: dict[str, Any]) -> str | None:
    given = inputs.get("attention_mask")
    masks = [*given.values()] if isinstance(given, dict) else [given]
    # The model makes masks itself where it is given none of all slots.
    if not any(isinstance(mask, torch.Tensor) for mask in masks):
        return "the model makes its masks itself"
    if any(mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 4) for mask in masks):
        return "the model makes its masks itself"
    if torch.is_autocast_enabled(inputs["input_ids"].device.type):
        return "autocast is on"
    return None


def _obstacle_in_modules(modules: Sequence[nn.Module]) -> str | None:
    if any(module.training for module in modules):
        return "the model is in training mode"
    if any("forward" in vars(module) or module._compiled_call_impl is not None for module in modules):
        return "modules have been given another forward"
    if any(has_foreign_hooks(module) for module in modules):
        return "modules have hooks"
    numbered = {type(module) for module in modules if NUMBER in vars(module)}
    if any(_computes_with_number(base.__module__) for kind in numbered for base in kind.__mro__[:-1]):
        return "blocks compute with their number"
    return None


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _strings_in(part)
    elif isinstance(value, str):
        yield value


@functools.cache
def _computes_with_number(module_name: str) -> bool:
    """Whether code of that module does with a layer's number anything but to find the layer in a cache."""
    if module_name.startswith("torch."):
        return False
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except OSError:
        return True
    made = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    allowed = {id(part) for function in made for part in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_of_cache(node.func):
            allowed.update(map(id, (*node.args, *(keyword.value for keyword in node.keywords))))
        elif isinstance(node, ast.Subscript) and _is_of_cache(node.value):
            allowed.add(id(node.slice))
    return any(
        isinstance(node, ast.Attribute) and node.attr == NUMBER and id(node) not in allowed for node in ast.walk(tree)
    )


def _is_of_cache(node: ast.expr) -> bool:
    """Whether the expression is an attribute of a cache, such as its method `update` or its `layers`."""
    if not isinstance(node, ast.Attribute):
        return False
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        inner = inner.value
    return isinstance(inner, ast.Name) and inner.id in _CACHES
