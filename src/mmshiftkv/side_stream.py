"""Selections beside the model's own work: on a GPU they run on a stream of their own, until the next layer's begins."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from shiftkv_kernels.device import on_device

_MOST_BYTES = 32 * 2**20
# By device: one for all caches, so that selections follow one another.
_streams: dict[torch.device, torch.cuda.Stream] = {}


class _Events(NamedTuple):
    """Of one device.

    Attributes:
        before: when what the last selection beside the model read was there.
        after: when it was complete.
    """

    before: torch.cuda.Event
    after: torch.cuda.Event


class SideStream:
    """The selection of one layer after another, each of which may run beside what the model does meanwhile.

    A selection of a short prompt is many small kernels, which leave most of a GPU idle.
    """

    def __init__(self) -> None:
        # Made once for all layers.
        self._events: dict[torch.device, _Events] = {}
        self._current: torch.cuda.Stream | None = None
        self._running: torch.device | None = None
        self._held: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SideStream":
        return SideStream()

    def has_time(self, device: torch.device) -> bool:
        """Whether a selection beside the model may save time; asked once for each, when what it reads is launched.

        Not where the device has done all of that and waits for Python: a second stream only takes Python more time.
        """
        self.join()
        if device not in self._events:
            self._events[device] = _Events(torch.cuda.Event(), torch.cuda.Event())
        main = self._current_stream(device)
        if main.query():
            return False
        self._events[device].before.record(main)
        return True

    @contextlib.contextmanager
    def running(self, device: torch.device, *held: Any) -> Iterator[list[torch.Tensor]]:
        """What is launched inside waits for what was launched before `has_time` was asked, and nothing waits for it.

        Args:
            device: the GPU.
            held: what is read inside: it stays until `join`, so that its memory is not given to others.

        Yields:
            A list for tensors that are made inside and used outside.
        """
        shared: list[torch.Tensor] = []
        before, after = self._events[device]
        with on_device(device.index):
            side, main = _stream_of(device), self._current_stream(device)
            side.wait_event(before)
            self._running, self._held = device, held
            torch.cuda.set_stream(side)
            try:
                yield shared
            finally:
                torch.cuda.set_stream(main)
                after.record(side)
        for tensor in shared:
            tensor.record_stream(main)

    def join(self) -> None:
        """Lets the device go on only when the selection is complete; Python does not wait."""
        if self._running is not None:
            self._current_stream(self._running).wait_event(self._events[self._running].after)
            self._running, self._held = None, ()

    def _current_stream(self, device: torch.device) -> torch.cuda.Stream:
        """As torch's function, but quick where it is that of the last call."""
        known = self._current
        number = torch._C._cuda_getCurrentRawStream(device.index)
        if known is None or known.device != device or known.cuda_stream != number:
            known = self._current = torch.cuda.current_stream(device)
        return known


def takes_side_stream(module: torch.nn.Module, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a selection from these keys and values of an attention module may run beside what comes next.

    Not where accelerate has put a hook on the module, nor while a CUDA graph is recorded; nor from a long prompt, which
    fills the GPU by itself: its keys and values would be held while the next things are computed.
    """
    if keys.device.type != "cuda" or keys.nbytes + values.nbytes > _MOST_BYTES:
        return False
    return "_hf_hook" not in vars(module) and not torch.cuda.is_current_stream_capturing()


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
