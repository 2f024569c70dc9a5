"""Launches of Triton kernels without the handling of arguments that Triton repeats for each.

Triton looks at every argument of every launch to find the kernel that was compiled for such ones, which costs several
times what the launch itself does.  Here that is looked up by a key that is quick to make; Triton is left to handle
what is not known yet.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

from .replaying import report_launch

_LARGEST_INT32 = 2**31 - 1
_MOST_LAUNCHES = 8192
# A compiled kernel, and its constants in the order of its parameters.
_Compiled = tuple[CompiledKernel, tuple[Any, ...]]
# By kernel, device, kinds of arguments and constants.
_compiled: dict[tuple[Any, ...], _Compiled] = {}
# By the same with the numbers themselves in place of their kinds, which takes no look at each: those used of late.
_launches: dict[tuple[Any, ...], _Compiled] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    others: Callable[[], Iterable[dict[str, Any]]] | None = None,
    **constants: Any,
) -> None:
    """Launches a kernel on the current device and stream.

    Args:
        kernel: a function under `triton.jit`, defined in a module.
        grid: programs along one to three axes.
        arguments: all that is not constant, in order: tensors, numbers, each always of one type, or None.
        others: gives the constants of launches for prompts of other lengths, so that all are compiled at once and no
            later prompt waits for it.
        constants: the `constexpr` parameters and the options of a launch, in one order at each call site.
    """
    if not isinstance(kernel, triton.JITFunction):  # it is interpreted
        kernel[grid](*arguments, **constants)
        report_launch(None, arguments)
        return
    device = torch.cuda.current_device()
    key = (
        id(kernel),  # its own hash is slow to find
        device,
        *[
            # Whether it is aligned, with the dtype.
            ((each.dtype, each.data_ptr() & 15 == 0) if isinstance(each, torch.Tensor) else each)
            for each in arguments
        ],
        *constants.values(),
    )
    known = _launches.get(key)
    if known is None:
        known = _find(kernel, device, grid, arguments, [constants, *(others() if others else ())])
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        _launches[key] = known
    compiled, in_order = known
    runner, given = compiled[(*grid, 1, 1)], (*arguments, *in_order)
    runner(*given)
    report_launch(runner, given)


def _find(
    kernel: Any, device: int, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: list[dict[str, Any]]
) -> _Compiled:
    """The kernel compiled with the first of the constants; those that are new are compiled side by side."""
    kinds = map(_kind, arguments, kernel.params)
    known = (id(kernel), device, *kinds)
    missing = {(*known, *each.values()): each for each in constants if (*known, *each.values()) not in _compiled}

    def compiled(each: dict[str, Any]) -> CompiledKernel:
        with torch.cuda.device(device):  # threads have their own
            return kernel.warmup(*arguments, grid=grid, **each)

    names = kernel.arg_names[len(arguments) :]
    if missing:
        with ThreadPoolExecutor(len(missing)) as pool:
            for (key, each), result in zip(missing.items(), pool.map(compiled, missing.values()), strict=True):
                _compiled[key] = result, tuple(each[name] for name in names)
    return _compiled[(*known, *constants[0].values())]


def _kind(argument: Any, parameter: Any) -> Any:
    """What compiled code depends on; as fine as Triton's own distinctions or finer."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        is_wide = not -_LARGEST_INT32 <= argument <= _LARGEST_INT32
        return is_wide if parameter.do_not_specialize else (argument == 1, argument % 16 == 0, is_wide)
    return type(argument)
