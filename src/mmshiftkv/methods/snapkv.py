"""SnapKV as a method."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..checks import check_integer
from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer
from .base import Method
from .window import in_window, keep_window, window_attention


@dataclass(frozen=True)
class SnapKV(Method):
    """SnapKV (Li et al., NeurIPS 2024, https://arxiv.org/abs/2404.14469): what the prompt's last queries attend to.

    The attention of the last `window` queries, causal among themselves, to the tokens before the window is averaged
    over the queries and over the query heads of a KV head, then pooled.  The window itself is always kept.

    Pooling takes averages, as in kvpress and by default in the authors' code, which can also take maxima.

    Attributes:
        window: inputs window, in tokens (the authors' code: 32; kvpress: 64).
        kernel_size: tokens that are pooled over, an odd number (the authors' code and kvpress: 5).

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    window: int = 32
    kernel_size: int = 5

    def __post_init__(self) -> None:
        for name in ("window", "kernel_size"):
            check_integer(name, getattr(self, name), minimum=1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd")

    @property
    def protected(self) -> int:
        """How many tokens are always kept: the window."""
        return self.window

    def observe(self, layer: AttentionLayer, inputs: LayerInput, earlier: LayerInput | None) -> LayerInput:
        """The last `window` tokens so far, in storage of their own."""
        tokens = inputs.hidden_states.shape[1]
        recent = inputs.tokens(max(tokens - self.window, 0), tokens)
        if earlier is None or tokens >= self.window:
            return recent.copied()
        hidden_states = torch.cat([earlier.hidden_states, recent.hidden_states], dim=1)
        both = LayerInput(hidden_states, earlier.positions.followed_by(recent.positions), None)
        return both.tokens(-self.window).copied()

    def score(
        self,
        layer: AttentionLayer,
        summary: LayerInput,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """Pooled attention of the window, at most 1; above it the window, the later a token the higher."""
        queries = self.queries(layer, summary)
        total = torch.zeros(keys.shape[:3], device=keys.device)
        for attention in window_attention(
            queries, keys, layer.scaling, valid, softcap=layer.softcap, sinks=layer.sinks
        ):
            total += attention.sum(dim=(2, 3))
        mean = total * (keys.shape[1] / (queries.shape[1] * queries.shape[2]))
        mean = mean.masked_fill(in_window(keys, self.window), 0)
        pooled = F.avg_pool1d(mean, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return keep_window(pooled, keys, self.window)

    def queries(self, layer: AttentionLayer, summary: LayerInput) -> torch.Tensor:
        """The rotated queries of the window, (B, H, window or all tokens, D)."""
        return layer.queries(summary.hidden_states, summary.positions)
