"""One step of decoding after another, with inputs that are made once: the model compiled as a whole."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..cache import PrefillSelectionCache
from .masks import StepMasks


class Step(Protocol):
    """The steps of one answer."""

    def prepare(self, tokens: torch.Tensor) -> None:
        """Makes ready for the next step, which reads `tokens`, (B, 1); not needed before the first one."""

    def logits(self) -> torch.Tensor:
        """Runs the step: its logits, (B, vocabulary), float32, in memory of their own."""


class WholeStep:
    """Steps that call a model, compiled or not.

    Args:
        forward: the model, or what is compiled of it.
        inputs: of the first step, as `prepare_inputs_for_generation` makes them; they are changed.
        cache: that is decoded on.
    """

    def __init__(self, forward: Callable[..., Any], inputs: dict[str, Any], cache: PrefillSelectionCache) -> None:
        self._forward = forward
        self._inputs = inputs
        self._cache = cache
        self._masks = StepMasks(inputs.get("attention_mask"), cache)

    def prepare(self, tokens: torch.Tensor) -> None:
        """As in `Step`."""
        self._cache.begin_pass(1)
        self._inputs["input_ids"].copy_(tokens)
        if self._inputs.get("position_ids") is not None:
            self._inputs["position_ids"].add_(1)
        self._inputs["attention_mask"] = self._masks.next()

    def logits(self) -> torch.Tensor:
        """As in `Step`."""
        logits = self._forward(**self._inputs, return_dict=True).logits
        return logits[:, -1].to(copy=True, dtype=torch.float32)
