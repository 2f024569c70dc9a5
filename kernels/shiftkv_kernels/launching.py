"""Launches of Triton kernels without the handling of arguments that Triton repeats for each.

Triton looks at every argument of every launch to find the kernel that was compiled for such ones, which costs several
times what the launch itself does.  Here that is looked up by a key that is quick to make; Triton is left to handle
what is not known yet.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.knobs import HookChain
from triton.runtime import driver

from .replaying import report_launch

_LARGEST_INT32 = 2**31 - 1
_MOST_LAUNCHES = 8192
_MOST_THREADS = 16
_state = threading.local()
_knobs = triton.knobs.runtime
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
        job = _Job(kernel, device, grid, arguments, [constants, *(others() if others else ())])
        if (jobs := getattr(_state, "jobs", None)) is not None:
            jobs.append(job)
            return
        known = _find(job)
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        _launches[key] = known
    if getattr(_state, "jobs", None) is not None:
        return
    compiled, in_order = known
    given = (*arguments, *in_order)
    runner = _Runner(compiled, grid, device)
    runner(*given)
    report_launch(runner, given, kernel.arg_names)


class _Runner:
    """Launches a kernel in the device's current stream; tensors may be given as addresses.

    Args:
        compiled: the kernel, ready to be launched.
        grid: programs along one to three axes.
        device: the number of the current device.
    """

    __slots__ = ("_compiled", "_device", "_grid", "_metadata", "_run", "_stream_of")

    def __init__(self, compiled: CompiledKernel, grid: tuple[int, ...], device: int) -> None:
        self._compiled, self._device = compiled, device
        self._grid = (*grid, 1, 1)[:3]
        self._stream_of = driver.active.get_current_stream
        self._run = compiled.run
        self._metadata = compiled.function, compiled.packed_metadata, None, None, None

    def __call__(self, *given: Any) -> None:
        stream = self._stream_of(self._device)
        before, after = _knobs.launch_enter_hook, _knobs.launch_exit_hook
        # Triton makes a record of each launch for those who watch, and calls them, even if there are none.
        is_unseen = before.__class__ is after.__class__ is HookChain and not before.calls and not after.calls
        if is_unseen:
            self._run(*self._grid, stream, *self._metadata, *given)
        else:
            self._compiled[self._grid](*given, stream=stream)


def _find(job: "_Job") -> _Compiled:
    """The kernel compiled with the first of the constants, and with the others too."""
    _compile([job])
    return _compiled[job.keys()[0]]


class _Job(NamedTuple):
    """A kernel to be compiled for some arguments, with some constants or others."""

    kernel: Any
    device: int
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: list[dict[str, Any]]

    def keys(self) -> list[tuple[Any, ...]]:
        """What each is known by."""
        known = (id(self.kernel), self.device, *map(_kind, self.arguments, self.kernel.params))
        return [(*known, *each.values()) for each in self.constants]

    def compiled(self, constants: dict[str, Any]) -> _Compiled:
        """The kernel, ready to be launched."""
        with torch.cuda.device(self.device):  # threads have their own
            kernel = self.kernel.warmup(*self.arguments, grid=self.grid, **constants)
            kernel[(1, 1, 1)]  # what a launch needs besides is made now, and nothing launched
        return kernel, tuple(constants[name] for name in self.kernel.arg_names[len(self.arguments) :])


def _compile(jobs: Iterable[_Job]) -> None:
    """Compiles what is new, side by side."""
    missing = {
        key: (job, constants)
        for job in jobs
        for key, constants in zip(job.keys(), job.constants, strict=True)
        if key not in _compiled
    }
    if missing:
        with ThreadPoolExecutor(min(len(missing), _MOST_THREADS)) as pool:
            results = pool.map(lambda each: each[0].compiled(each[1]), missing.values())
            _compiled.update(zip(missing, results, strict=True))


def compile_together(function: Callable[[], Any]) -> None:
    """Compiles, all side by side, what the launches of a function need; none of them is made.

    Args:
        function: does not look at the numbers in tensors, and leaves nothing behind.
    """
    jobs: list[_Job] = []
    _state.jobs = jobs
    try:
        function()
    finally:
        _state.jobs = None
    _compile(jobs)


def _kind(argument: Any, parameter: Any) -> Any:
    """What compiled code depends on; as fine as Triton's own distinctions or finer."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        is_wide = not -_LARGEST_INT32 <= argument <= _LARGEST_INT32
        return is_wide if parameter.do_not_specialize else (argument == 1, argument % 16 == 0, is_wide)
    return type(argument)
