"""Where the Triton kernels can run, and what a GPU has to offer them."""

import contextlib
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

try:
    import triton
except ImportError:  # not made for every platform
    triton = None

_PRODUCT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_compiled: set[Hashable] = set()
BACKENDS = ("auto", "triton", "torch")
_LEAST_CAPABILITY = (8, 0)
_AS_IT_IS: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class Gpu(NamedTuple):
    """What launches are fitted to."""

    multiprocessors: int
    has_warpgroup_products: bool  # Hopper and the Blackwells for data centres


@functools.lru_cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU; for a CPU, where kernels are interpreted, a made-up small one."""
    if device.type != "cuda":
        return Gpu(multiprocessors=4, has_warpgroup_products=False)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.major in (9, 10))


def on_device(index: int) -> contextlib.AbstractContextManager[Any]:
    """As `torch.cuda.device`, but quick where that GPU is the current one."""
    return _AS_IT_IS if index < 0 or torch.cuda.current_device() == index else torch.cuda.device(index)


def takes_triton(backend: str, device: torch.device, unless: str | None = None) -> bool:
    """Whether an operation on tensors of a device is left to Triton.

    Args:
        backend: "auto" (Triton on a GPU where it can run), "triton" or "torch".
        unless: why these tensors are nothing for its kernel; None: nothing speaks against it.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return device.type == "cuda" and unless is None and _obstacle(device) is None
    if backend != "triton":
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, BACKENDS))}")
    reason = _obstacle(device) or unless
    if reason is not None:
        raise ValueError(f'backend="triton" cannot be used: {reason}')
    return True


def no_product_of(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot multiply numbers of this dtype, if they cannot."""
    if dtype in _PRODUCT_DTYPES:
        return None
    return f"it multiplies {', '.join(map(str, _PRODUCT_DTYPES))}, not {dtype}"


def compile_once(name: Hashable, function: Callable[[], Any]) -> None:
    """Compiles together what the launches of a function need, where Triton runs and no function of that name was."""
    if name in _compiled or triton is None or is_interpreted():
        return
    from .launching import compile_together

    _compiled.add(name)
    compile_together(function)


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton interprets kernels, on any device, instead of compiling them."""
    return triton is not None and triton.knobs.runtime.interpret


def _obstacle(device: torch.device) -> str | None:
    if triton is None:
        return "Triton is not installed"
    if is_interpreted():
        return None
    return _missing_in_device(device)


@functools.lru_cache
def _missing_in_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    if torch.version.cuda is None:
        return "the kernels are made for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"{device} has compute capability {capability}, {_LEAST_CAPABILITY} is needed"
    return None
