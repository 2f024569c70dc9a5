"""Selections beside the model's own work: on a GPU they run on a stream of their own, until the next layer's begins."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_MOST_BYTES = 32 * 2**20
# By device: one for all caches, so that selections follow one another.
_streams: dict[torch.device, torch.cuda.Stream] = {}


class SideStream:
    """The selection of one layer after another, each of which may run beside what the model does meanwhile.

    A selection of a short prompt is many small kernels, which leave most of a GPU idle.
    """

    def __init__(self) -> None:
        # When what is read is there, and when the selection is complete; made once for all layers.
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._device: torch.device | None = None
        self._held: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SideStream":
        return SideStream()

    @contextlib.contextmanager
    def running(self, device: torch.device, *held: Any) -> Iterator[list[torch.Tensor]]:
        """What is launched inside waits for what was launched before, and what is launched later does not wait for it.

        Args:
            device: the GPU.
            held: what is read inside: it stays until `join`, so that its memory is not given to others.

        Yields:
            A list for tensors that are made inside and used outside.
        """
        self.join()
        shared: list[torch.Tensor] = []
        with torch.cuda.device(device):
            side, main = _stream_of(device), torch.cuda.current_stream()
            self._events = self._events or (torch.cuda.Event(), torch.cuda.Event())
            before, after = self._events
            before.record(main)
            side.wait_event(before)
            self._device, self._held = device, held
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
        if self._device is not None and self._events is not None:
            torch.cuda.current_stream(self._device).wait_event(self._events[1])
            self._device, self._held = None, ()


def takes_side_stream(module: torch.nn.Module, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a selection from these keys and values of an attention module may run beside what comes next.

    Not where accelerate has put a hook on the module, nor while a CUDA graph is recorded; nor from a long prompt, which
    fills the GPU by itself: its keys and values would be held while the next things are computed.
    """
    if keys.device.type != "cuda" or keys.nbytes + values.nbytes > _MOST_BYTES:
        return False
    return not hasattr(module, "_hf_hook") and not torch.cuda.is_current_stream_capturing()


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
