"""What a recorded step depends on: a recording reads the weights where they were, and runs the code that ran then."""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def signature_of_modules(modules: Iterable[nn.Module]) -> Hashable:
    """Changes as soon as weights lie elsewhere, or modules, or settings that they hold, are others.

    Of the modules of transformers' classes for whole models only weights and mode count: they keep what belongs to one
    prompt, such as the distance between positions and columns.
    """
    return tuple(_signature_of_module(module) for module in modules)


def signature_of_values(values: dict[str, Any]) -> Hashable:
    """Of settings: simple values and what is made of such count by value, others by identity."""
    return tuple((name, _frozen(value)) for name, value in values.items())


def signature_of_tensors(tensors: Iterable[torch.Tensor]) -> Hashable:
    """Where tensors lie, and how."""
    return tuple((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)


def _signature_of_module(module: nn.Module) -> Hashable:
    held = [part for part in (*module._parameters.values(), *module._buffers.values()) if part is not None]
    settings: Hashable = ()
    if not isinstance(module, PreTrainedModel):
        own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
        settings = signature_of_values(own)
    return id(type(module)), module.training, signature_of_tensors(held), settings


def _frozen(value: Any) -> Hashable:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.dtype
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return id(value)
