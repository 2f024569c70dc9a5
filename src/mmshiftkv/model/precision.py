"""The dtypes that the library computes in."""

import contextlib
from typing import Any

import torch

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # others are those of quantised weights
_AS_IT_IS: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast on this device for a while: statistics and scores choose their dtypes themselves."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS
