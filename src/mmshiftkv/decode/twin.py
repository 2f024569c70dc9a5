"""A copy of a model that runs its decoder blocks and its head another way, and shares all else with the model.

Nothing is changed in the model itself, and other threads may run it meanwhile.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from shiftkv_kernels import MOST_ROWS, project_token

# What torch keeps of hooks.  Those of another thread's prefill may be on a block while it is copied.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
NUMBER = "layer_idx"

RunBlock = Callable[..., Any]  # (number of the block, block, *args, **kwargs) -> what the block returns


def path_to_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> list[str] | None:
    """The names that lead from a model to the list of its decoder blocks; None if there is no such list."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and [*module] == [*blocks]:
            return name.split(".")
    return None


def modules_of_step(model: nn.Module, path: Sequence[str]) -> list[nn.Module]:
    """All modules that a decoding step may use: other models in the model, which see images, are left out.

    Args:
        model: the model.
        path: as `path_to_blocks` gives it.
    """
    on_path = [model]
    for name in path:
        on_path.append(on_path[-1].get_submodule(name))
    found = [*on_path]
    for module in on_path:
        for child in module.children():
            if child not in on_path and not isinstance(child, PreTrainedModel):
                found += child.modules()
    return found


def twin_of(model: PreTrainedModel, path: Sequence[str], run: RunBlock) -> PreTrainedModel:
    """A model like `model`, with the same parameters, whose blocks call `run`.

    Args:
        model: the model.
        path: as `path_to_blocks` gives it.
        run: gets a block's number, a copy of the block that does not know its number, and what the block is given.

    Returns:
        The twin.  It is good for as long as nothing in the model is replaced.
    """
    twin = inner = _copied(model)
    _replace_head(twin, model)
    for name in path:
        copied = _copied(inner.get_submodule(name))
        inner._modules[name] = copied
        inner = copied
    for number, (name, block) in enumerate(inner.named_children()):
        shell = _copied(block)
        shell.__dict__["forward"] = partial(run, number, _without_number(block))
        inner._modules[name] = shell
    return twin


def _copied(module: Any) -> Any:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    twin.__dict__.update((name, OrderedDict()) for name in _HOOKS)
    return twin


def _without_number(module: nn.Module) -> nn.Module:
    """A copy of a block that takes itself for the first layer: compiled code must not depend on the number."""
    twin = _copied(module)
    for name, child in twin.named_children():
        if any(hasattr(part, NUMBER) for part in child.modules()):
            twin._modules[name] = _without_number(child)
    if NUMBER in vars(twin):
        vars(twin)[NUMBER] = 0
    return twin


def _replace_head(twin: nn.Module, model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    for name, child in model.named_children():
        if child is head and type(child) is nn.Linear:
            shell = _copied(child)
            shell.__dict__["forward"] = partial(_project, child)
            twin._modules[name] = shell


def _project(layer: nn.Linear, state: torch.Tensor) -> torch.Tensor:
    weight, bias = layer.weight, layer.bias
    parts = [state, weight] if bias is None else [state, weight, bias]
    are_few = 0 < state.numel() <= MOST_ROWS * state.shape[-1]
    if are_few and all(part.is_contiguous() and part.dtype == state.dtype for part in parts):
        return project_token(state, [weight], [bias])[0]
    return linear(state, weight, bias)
