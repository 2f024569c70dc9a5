"""Modules whose weights accelerate keeps elsewhere, in memory or on disk, and brings in only while they run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def with_weights(module: nn.Module) -> Iterator[None]:
    """Brings in the module's own weights for a while if accelerate keeps them elsewhere; its parts do so themselves."""
    hook: Any = getattr(module, "_hf_hook", None)
    is_away = any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False))
    if hook is None or not is_away:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weights are when it runs."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
