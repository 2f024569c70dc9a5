"""Selections beside the model's own work: on a GPU they run on a stream of their own, under the layer's attention."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

# By device: one for all caches, so that selections follow one another.
_streams: dict[torch.device, torch.cuda.Stream] = {}


class SideStream:
    """The selection of one layer after another, each of which may run beside what the model does meanwhile.

    A selection of a short prompt is many small kernels, which leave most of a GPU idle.
    """

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._held: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SideStream":
        return SideStream()

    @contextlib.contextmanager
    def running(self, device: torch.device, *held: Any) -> Iterator[None]:
        """What is launched inside waits for what was launched before, and what is launched later does not wait for it.

        Args:
            device: the GPU.
            held: what is read inside: it stays until `join`, so that its memory is not given to others.
        """
        self.join()
        side, main = _stream_of(device), torch.cuda.current_stream(device)
        side.wait_stream(main)
        self._held = held
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            self._event = side.record_event()

    def join(self) -> None:
        """Lets the device go on only when the selection is complete; Python does not wait."""
        if self._event is not None:
            torch.cuda.current_stream(self._event.device).wait_event(self._event)
            self._event, self._held = None, ()


def takes_side_stream(device: torch.device, module: torch.nn.Module) -> bool:
    """Whether a selection from a layer may run beside it.

    Not where accelerate moves the module's weights in and out, nor while a CUDA graph is recorded.
    """
    is_free = device.type == "cuda" and not hasattr(module, "_hf_hook")
    return is_free and not torch.cuda.is_current_stream_capturing()


def share_with_main(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Says of tensors made inside of `SideStream.running` that they are used outside of it."""
    main = torch.cuda.current_stream(device)
    for tensor in tensors:
        tensor.record_stream(main)


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
