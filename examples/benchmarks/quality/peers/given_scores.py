"""Scores that were made before the cache was as a method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmshiftkv import Method


@dataclass(frozen=True, eq=False)
class GivenScores(Method):
    """Keeps the tokens with the highest given scores, of one batch of prompts.

    Unlike other methods it belongs to these prompts: what scores them has run before.

    Attributes:
        scores: for each layer (B, H_kv, T) float32, not negative, T the columns of the prompts with their padding.
    """

    scores: Sequence[torch.Tensor]

    def observe(self, layer: Any, inputs: Any, earlier: None) -> None:
        """Nothing: the scores are there."""

    def score(
        self, layer: Any, summary: None, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Those given for the layer.

        Raises:
            ValueError: they are those of other prompts, or there are none.
        """
        if len(self.scores) <= layer.index or self.scores[layer.index].shape != keys.shape[:3]:
            raise ValueError(
                f"scores: none of shape {tuple(keys.shape[:3])} for layer {layer.index}; they must be those of the "
                "prompts that the cache gets"
            )
        return self.scores[layer.index]
