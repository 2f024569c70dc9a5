"""SnapKV with the length of the values as a method."""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.quality.peers.scaling import scaled
from mmshiftkv.methods.snapkv import SnapKV
from mmshiftkv.methods.window import keep_window


@dataclass(frozen=True)
class SnapKVValues(SnapKV):
    """SnapKV whose pooled window attention is multiplied by the length of the token's value.

    The idea is that of VATP (Guo et al., EMNLP 2024, https://arxiv.org/abs/2406.12335): what a token adds to the output
    is its attention times its value.  VATP multiplies the attention of H2O or Scissorhands, which is summed over all
    queries so far, by the L1 norm, and always keeps the first tokens.  Here the attention is that of SnapKV's window,
    pooled, the length is the L2 norm, as in ExpectedAttention, and of the first tokens none is set apart.

    The settings are those of `SnapKV`.
    """

    def score(
        self, layer: Any, summary: Any, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores (B, H_kv, T) float32, as `Method.score` says: at most 1, and the window above it."""
        attention = super().score(layer, summary, keys, values, valid)
        lengths = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
        return keep_window(scaled(attention * lengths, keys, self.window, valid), keys, self.window)
