"""DropKV, the leave-one-out error on the prompt's last queries, as a method."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.quality.peers.scaling import scaled
from mmshiftkv.checks import check_real
from mmshiftkv.methods.snapkv import SnapKV
from mmshiftkv.methods.window import keep_window, window_attention


@dataclass(frozen=True)
class DropKV(SnapKV):
    """How much the output of the prompt's last queries changes without a token.

    Without token j the attention of the others is renormalized, and the output o of a query whose attention to j is m
    changes by exactly m / (1 - m) * |v_j - o|.  This leave-one-out error is the score of CAOTE (Goel et al., 2025,
    https://arxiv.org/abs/2504.14051) for one query, and squared and summed over a window of queries that of DropKV
    (https://openreview.net/forum?id=MqfNzH3TVH; kvpress issue 284 and pull request 285).  Settings and conventions are
    those of that pull request: squares summed over the queries of the window, causal among themselves, averaged over
    the query heads of a KV head, then pooled together with those of the window's tokens; the window is always kept.

    All is float32; there the attention is rounded to the model's dtype first.  The distance is computed as such; there
    it is the difference of squares, which cancels where v_j is near o.

    Attributes:
        window: the last queries, in tokens, that the error is summed over (pull request: 32).
        kernel_size: tokens that are pooled over (pull request: 7).
        epsilon: added to 1 - m (pull request: 1e-6).

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    kernel_size: int = 7
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("epsilon", self.epsilon, lambda value: 0 < value < math.inf, "a finite number > 0")

    def score(
        self, layer: Any, summary: Any, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores (B, H_kv, T) float32, as `Method.score` says: at most 1, and the window above it."""
        errors = self.squared_errors(self.queries(layer, summary), keys, values, layer, valid)
        pooled = F.avg_pool1d(errors, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return keep_window(scaled(pooled, keys, self.window, valid), keys, self.window)

    def squared_errors(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: Any,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """Squared leave-one-out errors, summed over the queries and averaged over the query heads of a KV head.

        Args:
            queries: (B, H, n, D), rotated, of the last n of T tokens.
            keys, values: (B, H_kv, T, D) and (B, H_kv, T, D_v).
            layer: the attention layer.
            valid: (B, T) bool, or None.

        Returns:
            (B, H_kv, T) float32.
        """
        wide_values = values.float()
        total = torch.zeros(keys.shape[:3], device=keys.device)
        for attention in window_attention(
            queries, keys, layer.scaling, valid, softcap=layer.softcap, sinks=layer.sinks
        ):
            mass = attention.flatten(2, 3)  # (B, H_kv, r * m, T)
            # Not by matrix products, whose difference of squares rounds small distances to anything.
            distances = torch.cdist(mass @ wide_values, wide_values, compute_mode="donot_use_mm_for_euclid_dist")
            total += (mass / (1 - mass + self.epsilon) * distances).square().sum(dim=2)
        return total * (keys.shape[1] / queries.shape[1])
