"""KeyDiff as a method."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer
from .base import Method


@dataclass(frozen=True)
class KeyDiff(Method):
    """KeyDiff (Park et al., NeurIPS 2025, https://arxiv.org/abs/2504.15364): the keys least like the mean key.

    The mean is that of the keys' directions.  The prompt is looked at once and as a whole, as in kvpress; the paper
    does so block by block while it evicts.
    """

    def observe(self, layer: AttentionLayer, inputs: LayerInput, earlier: None) -> None:
        """Nothing: the keys say it all."""

    def score(
        self,
        layer: AttentionLayer,
        summary: None,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """One minus the cosine of the angle to the mean direction."""
        directions = F.normalize(keys.float(), dim=-1)
        weights = torch.ones_like(keys[:, :1, :, 0], dtype=torch.float32) if valid is None else valid[:, None].float()
        anchor = F.normalize(weights[:, :, None] @ directions, dim=-1)
        return (1 - (directions @ anchor.transpose(-1, -2)).squeeze(-1)).clamp_min(0)
