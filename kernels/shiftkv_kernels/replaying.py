"""Does the same to other tensors of the same shapes, without the Python that led to it.

All layers of a model are selected from alike.  What an operation computes in Python, from shapes and settings, comes to
the same for each of them; only where the tensors lie differs.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .device import on_device
from .workspace import Workspace

Tensors = tuple[torch.Tensor | None, ...]
Numbers = Mapping[str, float]
Bases = list[torch.Tensor | None]  # the workspace, outputs, inputs, and what functions of torch gave so far
Runner = Callable[..., None]  # (*arguments), tensors among them or their addresses

_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)
# Linear layers, and what norms are made of: nothing but their tensors says what they give.
_FUNCTIONS = frozenset(
    (
        _aten.addmm.default,
        _aten.mm.default,
        _aten.linear.default,
        _aten._to_copy.default,
        _aten.pow.Tensor_Scalar,
        _aten.mean.dim,
        _aten.add.Tensor,
        _aten.mul.Tensor,
        _aten.rsqrt.default,
    )
)
# A view by another name.
_VIEWS = frozenset((_aten._unsafe_view.default,))
_MOST_RECORDINGS = 256
_state = threading.local()


class _Launch(NamedTuple):
    """A launch, as it was reported."""

    runner: Runner | None
    arguments: tuple[Any, ...]
    names: Sequence[str]


class _Call(NamedTuple):
    """A function of torch: its arguments, and what it gave."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: torch.Tensor


def report_launch(runner: Runner | None, arguments: tuple[Any, ...], names: Sequence[str] = ()) -> None:
    """Tells the recording of this thread, if there is one, of a launch.

    Args:
        runner: repeats it; None: it cannot be repeated.
        arguments: as they were given.
        names: of the first of them.
    """
    watch: _Watch | None = getattr(_state, "watch", None)
    if watch is not None:
        watch.steps.append(_Launch(runner, arguments, names))


class Replays:
    """The recordings of functions, by what their inputs look like."""

    def __init__(self) -> None:
        self._recordings: dict[Hashable, _Recording | None] = {}

    def run(
        self, function: Callable[[], Tensors], inputs: Tensors, key: Hashable, numbers: Numbers | None = None
    ) -> Tensors:
        """What `function` returns, by itself or by what it did before.

        The first run for inputs that look alike is watched.  If it did nothing to tensors but make them, launch kernels
        of this package and call linear layers and norms, later runs repeat that.

        Args:
            function: reads and writes, of tensors that are not its own, only the inputs; all else that it depends on is
                in the key and the numbers.
            inputs: on one device; None stands for one that there is not.
            key: tells what else it depends on.
            numbers: what it passes to kernels under these names of their parameters, and may be another in each run;
                the kernels are compiled for any such number.
        """
        if getattr(_state, "watch", None) is not None:  # a part of what is being watched
            return function()
        whole_key = (
            key,
            *[
                None if one is None else (one.shape, one.stride(), one.dtype, one.device, one.data_ptr() & 15)
                for one in inputs
            ],
        )
        try:
            recording = self._recordings[whole_key]
        except KeyError:
            outputs, recording = _record(function, inputs, numbers or {})
            if len(self._recordings) >= _MOST_RECORDINGS:
                self._recordings.clear()
            self._recordings[whole_key] = recording
            return outputs
        return function() if recording is None else recording.replay(inputs, numbers or {})


class _Watch(TorchDispatchMode):
    """Sees what is done to tensors, and what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []
        self.steps: list[_Launch | _Call] = []
        self.is_complete = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        result = func(*args, **keywords)
        if func in _ALLOCATIONS:
            # Held, so that no two have the same address.
            self.made.append(result)
        elif func in _FUNCTIONS:
            self.steps.append(_Call(func, args, keywords, result))
        elif func not in _VIEWS and not _is_view(func):
            self.is_complete = False
        return result

    @property
    def results(self) -> list[torch.Tensor]:
        """What the functions of torch gave."""
        return [step.result for step in self.steps if isinstance(step, _Call)]


def _is_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _record(function: Callable[[], Tensors], inputs: Tensors, numbers: Numbers) -> "tuple[Tensors, _Recording | None]":
    watch = _Watch()
    _state.watch = watch
    try:
        with watch:
            outputs = function()
    finally:
        _state.watch = None
    if not watch.is_complete or any(isinstance(step, _Launch) and step.runner is None for step in watch.steps):
        return outputs, None
    try:
        return outputs, _Recording(watch, inputs, outputs, numbers)
    except LookupError:
        return outputs, None


class _Recording:
    """What one run did.

    Args:
        watch: has seen the run.
        inputs: of the run.
        outputs: of the run.
        numbers: of the run.

    Raises:
        LookupError: something was given a tensor that is neither an input nor was made in the run, an output is a part
            of something, or it cannot be told which of two inputs was meant.
    """

    def __init__(self, watch: _Watch, inputs: Tensors, outputs: Tensors, numbers: Numbers) -> None:
        starts = [tensor.data_ptr() for tensor in inputs if tensor is not None and tensor.numel()]
        if len({*starts}) < len(starts):
            raise LookupError("two inputs at one address")
        self._device = next(tensor.device for tensor in (*inputs, *watch.made) if tensor is not None)
        self._outputs = [None if tensor is None else _maker(tensor, inputs, watch.made) for tensor in outputs]
        uses = [[each for each in _parts(step) if isinstance(each, torch.Tensor)] for step in watch.steps]
        places = Workspace((*outputs, *inputs, *watch.results), watch.made, uses)
        self._bytes = places.bytes
        self._steps = [
            _Replayed(step, numbers, places) if isinstance(step, _Launch) else _Recalled(step, places)
            for step in watch.steps
        ]

    def replay(self, inputs: Tensors, numbers: Numbers) -> Tensors:
        """Does the same to other inputs that look the same."""
        outputs = tuple(None if make is None else make(inputs) for make in self._outputs)
        workspace = torch.empty(self._bytes, dtype=torch.uint8, device=self._device)
        bases: Bases = [workspace, *outputs, *inputs]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in bases]
        with on_device(workspace.get_device()):
            for step in self._steps:
                step.run(bases, addresses, numbers)
        return outputs


def _parts(step: _Launch | _Call) -> tuple[Any, ...]:
    return step.arguments if isinstance(step, _Launch) else (*step.arguments, *step.keywords.values())


def _maker(
    output: torch.Tensor, inputs: Tensors, made: Sequence[torch.Tensor]
) -> Callable[[Tensors], torch.Tensor | None]:
    """Gives tensors like an output, which must be an input or all of a tensor made in the run."""
    for index, tensor in enumerate(inputs):
        if tensor is output:
            return lambda inputs: inputs[index]
    storage = output.untyped_storage()
    if not any(tensor.untyped_storage().data_ptr() == storage.data_ptr() for tensor in made):
        raise LookupError("an output that was not made in the run")
    if output.data_ptr() != storage.data_ptr() or output.nbytes != storage.nbytes():
        raise LookupError("an output that is a part of something")
    shape, stride, dtype, device = output.shape, output.stride(), output.dtype, output.device
    return lambda inputs: torch.empty_strided(shape, stride, dtype=dtype, device=device)


class _Replayed:
    """A launch at other addresses."""

    def __init__(self, launch: _Launch, numbers: Numbers, places: Workspace) -> None:
        assert launch.runner is not None
        self._runner = launch.runner
        arguments = [*enumerate(launch.arguments)]
        self._arguments = [None if isinstance(each, torch.Tensor) else each for each in launch.arguments]
        self._tensors = [(index, *places.find(each)[:2]) for index, each in arguments if isinstance(each, torch.Tensor)]
        self._numbers = [(index, name) for index, name in enumerate(launch.names) if name in numbers]
        if any(launch.arguments[index] != numbers[name] for index, name in self._numbers):
            raise LookupError("a number that is not passed on as it is")

    def run(self, bases: Bases, addresses: list[int], numbers: Numbers) -> None:
        given = self._arguments.copy()
        for index, base, offset in self._tensors:
            given[index] = addresses[base] + offset
        for index, name in self._numbers:
            given[index] = numbers[name]
        self._runner(*given)


class _Recalled:
    """A function of torch of other tensors."""

    def __init__(self, call: _Call, places: Workspace) -> None:
        self._function = call.function
        self._arguments = [None if isinstance(each, torch.Tensor) else each for each in call.arguments]
        self._places = [
            (index, places.find(each)) for index, each in enumerate(call.arguments) if isinstance(each, torch.Tensor)
        ]
        self._keywords = call.keywords
        if any(isinstance(each, torch.Tensor) for each in call.keywords.values()):
            raise LookupError("a tensor as a keyword")

    def run(self, bases: Bases, addresses: list[int], numbers: Numbers) -> None:
        given = self._arguments.copy()
        for index, place in self._places:
            given[index] = place.part_of(bases)
        result = self._function(*given, **self._keywords)
        bases.append(result)
        addresses.append(result.data_ptr())
