"""Runs the same launches again for other tensors of the same shapes, without the Python that led to them.

All layers of a model are selected from alike.  What an operation computes in Python, from shapes and settings, comes to
the same for each of them; only where the tensors lie differs.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = tuple[torch.Tensor | None, ...]
Runner = Callable[..., None]  # (*arguments), tensors among them or their addresses

_ALIGNMENT = 256  # bytes, in the workspace: at least that of any tensor of its own, as far as kernels look
_ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name).default if name != "empty" else torch.ops.aten.empty.memory_format
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
_state = threading.local()


def report_launch(runner: Runner | None, arguments: tuple[Any, ...]) -> None:
    """Tells the recording of this thread, if there is one, of a launch; None: of one that cannot be repeated."""
    watch: _Watch | None = getattr(_state, "watch", None)
    if watch is not None:
        watch.launches.append((runner, arguments))


class Replays:
    """The recordings of one function, by what its inputs look like."""

    def __init__(self) -> None:
        self._recordings: dict[Hashable, _Recording | None] = {}

    def run(self, function: Callable[[], Tensors], inputs: Tensors, key: Hashable) -> Tensors:
        """What `function` returns, by itself or by its launches alone.

        The first run for inputs that look alike is watched.  If it did nothing to tensors but make them and launch
        kernels of this package, later runs repeat the launches.

        Args:
            function: reads and writes, of tensors that are not its own, only the inputs; all else that it depends on is
                in the key.
            inputs: on one device; None stands for one that there is not.
            key: tells what else it depends on.
        """
        whole_key = (key, *map(_look, inputs))
        if whole_key not in self._recordings:
            outputs, self._recordings[whole_key] = _record(function, inputs)
            return outputs
        recording = self._recordings[whole_key]
        return function() if recording is None else recording.replay(inputs)


def _look(tensor: torch.Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


class _Watch(TorchDispatchMode):
    """Sees what is done to tensors, and what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []
        self.launches: list[tuple[Runner | None, tuple[Any, ...]]] = []
        self.is_complete = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            # Held, so that no two have the same address.
            self.made.append(result)
        elif not _is_view(func):
            self.is_complete = False
        return result


def _is_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _record(function: Callable[[], Tensors], inputs: Tensors) -> "tuple[Tensors, _Recording | None]":
    watch = _Watch()
    _state.watch = watch
    try:
        with watch:
            outputs = function()
    finally:
        _state.watch = None
    if not watch.is_complete or any(runner is None for runner, _ in watch.launches):
        return outputs, None
    try:
        return outputs, _Recording(watch, inputs, outputs)
    except LookupError:
        return outputs, None


class _Recording:
    """The launches of one run.

    Args:
        watch: has seen the run.
        inputs: of the run.
        outputs: of the run.

    Raises:
        LookupError: a launch was given a tensor that is neither an input nor was made in the run, or an output is a
            part of something.
    """

    def __init__(self, watch: _Watch, inputs: Tensors, outputs: Tensors) -> None:
        self._device = next(tensor.device for tensor in (*inputs, *watch.made) if tensor is not None)
        self._outputs = [None if tensor is None else _whole(tensor, watch.made) for tensor in outputs]
        places = _Places(watch.made, inputs, outputs)
        self._bytes = places.workspace_bytes
        self._launches = [
            (
                runner,
                [None if isinstance(each, torch.Tensor) else each for each in arguments],
                [(index, *places.find(each)) for index, each in enumerate(arguments) if isinstance(each, torch.Tensor)],
            )
            for runner, arguments in watch.launches
        ]

    def replay(self, inputs: Tensors) -> Tensors:
        """Runs the launches for other inputs that look the same."""
        outputs = tuple(None if made is None else made() for made in self._outputs)
        workspace = torch.empty(self._bytes, dtype=torch.uint8, device=self._device)
        bases = [0 if tensor is None else tensor.data_ptr() for tensor in (workspace, *outputs, *inputs)]
        with torch.cuda.device_of(workspace):
            for runner, arguments, tensors in self._launches:
                given = arguments.copy()
                for index, base, offset in tensors:
                    given[index] = bases[base] + offset
                assert runner is not None
                runner(*given)
        return outputs


def _whole(output: torch.Tensor, made: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Makes tensors like an output, which must be all of a tensor made in the run."""
    storage = output.untyped_storage()
    if not any(tensor.untyped_storage().data_ptr() == storage.data_ptr() for tensor in made):
        raise LookupError("an output that was not made in the run")
    if output.data_ptr() != storage.data_ptr() or output.nbytes != storage.nbytes():
        raise LookupError("an output that is a part of something")
    shape, stride, dtype, device = output.shape, output.stride(), output.dtype, output.device
    return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)


class _Places:
    """Where tensors lie: in the workspace (0), in one of the outputs (from 1 on) or in one of the inputs (then)."""

    def __init__(self, made: Sequence[torch.Tensor], inputs: Tensors, outputs: Tensors) -> None:
        self.workspace_bytes = 0
        self._exact: dict[int, int] = {}
        # By address of a storage: the base, the offset in it, and the address that both are of.
        self._storages: dict[int, tuple[int, int, int]] = {}
        for base, tensor in enumerate((*outputs, *inputs), start=1):
            if tensor is not None:
                self._exact.setdefault(tensor.data_ptr(), base)
                self._storages.setdefault(tensor.untyped_storage().data_ptr(), (base, 0, tensor.data_ptr()))
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages:
                self._storages[storage.data_ptr()] = 0, self.workspace_bytes, storage.data_ptr()
                self.workspace_bytes += -(storage.nbytes() // -_ALIGNMENT) * _ALIGNMENT

    def find(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Base and offset in bytes."""
        address = tensor.data_ptr()
        if address in self._exact:
            return self._exact[address], 0
        base, offset, start = self._storages[tensor.untyped_storage().data_ptr()]
        return base, offset + address - start
