"""CriticalKV's two stages on SnapKV's scores as a method."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.quality.last_query import raise_highest, tokens_set_aside
from benchmarks.quality.peers.scaling import scaled
from mmshiftkv.checks import check_budget, check_real, tokens_to_keep
from mmshiftkv.methods.snapkv import SnapKV
from mmshiftkv.methods.window import keep_window

_TOKENS_AT_ONCE = 512  # bounds the projected values, (B, H_kv, so many, hidden size) float32


@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """CriticalKV (Feng et al., 2025, https://arxiv.org/abs/2502.03805, the two-stage algorithm) on SnapKV's scores.

    The first stage gives a share of the budget to the tokens with the most attention.  The second stage gives the rest
    to those with the highest (attention + epsilon) * |W_O v|_1, a bound on how much the layer's output changes without
    them: the L1 norm of the value behind the output projection, averaged over the query heads of the KV head, each with
    its own columns of W_O.

    Settings and conventions are those of kvpress 0.5.5 (`CriticalKVPress(SnapKVPress)`): the attention is SnapKV's,
    pooled, and the window counts among the places of the first stage, where it comes first.  These differ: the window
    is kept whole even if it is longer than the first stage, and the norms are computed in float32.

    Attributes:
        budget: that of the cache, as the two stages share it: tokens (int) or a share of the prompt (float).
        first_stage_share: share of the budget, rounded down, that the first stage gives (paper and kvpress: 0.5).
        epsilon: added to the attention in the second stage (paper and kvpress: 1e-4).

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    budget: int | float = 1.0
    first_stage_share: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_real("first_stage_share", self.first_stage_share, lambda value: 0 <= value < 1, "in [0, 1)")
        check_real("epsilon", self.epsilon, lambda value: 0 <= value < math.inf, "a finite number >= 0")

    def score(
        self, layer: Any, summary: Any, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores (B, H_kv, T) float32, as `Method.score` says: at most 1, and the window above it."""
        attention = super().score(layer, summary, keys, values, valid)
        critical = (attention + self.epsilon) * projected_norms(layer.module.o_proj.weight, values)
        scores = scaled(critical, keys, self.window, valid)
        places = tokens_set_aside(self.first_stage_share, tokens_to_keep(self.budget, keys.shape[2]))
        # One of the places is the last token's, which `raise_highest` leaves out.  A bonus of 2 is more than the scores
        # can be apart, and a quarter of the sum is at most 1.
        scores = raise_highest(scores, attention, max(places - 1, 0), 2.0, valid) / 4
        return keep_window(scores, keys, self.window)


def projected_norms(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The L1 norms of the values behind the output projection, averaged over the query heads of a KV head.

    Args:
        weight: (d, H * D), that of the output projection.
        values: (B, H_kv, T, D).

    Returns:
        (B, H_kv, T) float32.
    """
    kv_heads, tokens, head_dim = values.shape[1:]
    by_head = weight.float().unflatten(1, (kv_heads, -1, head_dim)).permute(2, 1, 3, 0)  # (r, H_kv, D, d)
    norms = torch.zeros(values.shape[:3], device=values.device)
    for start in range(0, tokens, _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        for projection in by_head:
            norms[:, :, part] += (values[:, :, part].float() @ projection).abs().sum(dim=-1)
    return norms / len(by_head)
