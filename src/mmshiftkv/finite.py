"""A warning about prompts with numbers that are not finite, without waiting for the device."""

import warnings
from typing import Any

import torch

MESSAGE = (
    "the prompt has keys or values that are not finite (NaN or inf): tokens whose score they spoil come last, and "
    "zeros are stored for such numbers; the model may have overflowed in its dtype"
)


class FiniteCheck:
    """Whether the scores of one prompt, and what is stored of it, were finite in all layers.

    A flag on each device says it, which is looked at when it has come to the host.
    A deep copy has nothing to warn of: the original does.
    """

    def __init__(self) -> None:
        self._flags: dict[torch.device, torch.Tensor] = {}
        self._copies: list[tuple[torch.Tensor, Any]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "FiniteCheck":
        return FiniteCheck()

    def flag(self, device: torch.device) -> torch.Tensor:
        """The flag on a device, (1,) bool, which what is not finite sets to True."""
        if device not in self._flags:
            self._flags[device] = torch.zeros(1, dtype=torch.bool, device=device)
        return self._flags[device]

    def end_prompt(self) -> None:
        """All layers have been scored: the flags are on their way to the host."""
        for device, flag in self._flags.items():
            copy, event = flag.to("cpu", non_blocking=True), None
            if device.type == "cuda":
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
            self._copies.append((copy, event))
        self._flags.clear()

    def warn(self) -> bool:
        """Warns if a flag that has arrived is set.

        Returns:
            Whether all flags have arrived.
        """
        while self._copies:
            copy, event = self._copies[-1]
            if event is not None and not event.query():
                return False
            self._copies.pop()
            if copy.item():
                self._copies.clear()
                warnings.warn(MESSAGE, stacklevel=2)
        return True
