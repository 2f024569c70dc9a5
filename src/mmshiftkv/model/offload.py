"""Modules whose weights accelerate keeps elsewhere, in memory or on disk, and brings in only while they run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .parallel import with_local_parameters


@contextlib.contextmanager
def with_weights(module: nn.Module) -> Iterator[None]:
    """Brings in the module's own weights for a while if accelerate keeps them elsewhere, or several processes share it.

    Its parts do so themselves.
    """
    hook: Any = getattr(module, "_hf_hook", None)
    is_away = any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False))
    if hook is None or not is_away:
        with with_local_parameters(getattr(module, "_orig_mod", module)):  # of a compiled module its own
            yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def stored_weight(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter by its dotted name, from where accelerate keeps it if it is elsewhere.

    The module stays as it is, as another thread may be running it.  On the meta device if it is nowhere.
    """
    owner, _, own_name = name.rpartition(".")
    part = module.get_submodule(owner)
    weight: torch.Tensor = getattr(part, own_name).detach()
    weights: Any = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
    return weight if weight.device.type != "meta" or weights is None else weights[own_name].to(weight.dtype)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weights are when it runs; of a whole model, where its inputs belong."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
