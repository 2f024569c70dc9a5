"""SnapKV as a method."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..checks import check_integer
from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer
from .base import Method
from .columns import columns_of

_QUERIES_AT_ONCE = 16  # bounds the logits, (B, H, so many, T) float32


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
        both = [(getattr(earlier, name), getattr(recent, name)) for name in ("hidden_states", "cos", "sin")]
        hidden_states, cos, sin = (torch.cat(parts, dim=1)[:, -self.window :].clone() for parts in both)
        return LayerInput(hidden_states, cos, sin, None)

    def score(
        self,
        layer: AttentionLayer,
        summary: LayerInput,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """Pooled attention of the window, at most 1; above it the window, the later a token the higher."""
        queries = layer.rotate(layer.project_queries(summary.hidden_states), summary.cos, summary.sin)
        columns = columns_of(keys)
        in_window = columns >= keys.shape[2] - self.window
        attention = _window_attention(queries, keys, layer.scaling, valid).masked_fill(in_window, 0)
        pooled = F.avg_pool1d(attention, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return torch.where(in_window, (columns + 2).float(), pooled)


def _window_attention(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, valid: torch.Tensor | None
) -> torch.Tensor:
    """Causal attention of the last n tokens, averaged over them and over each GQA group.

    Args:
        queries: (B, H, n, D), rotated, of the last n of T tokens.
        keys: (B, H_kv, T, D).
        scaling: factor on the logits.
        valid: (B, T) bool, or None.  Where a query is padding, its row's tokens all lie in the window: what they get
            does not matter.

    Returns:
        (B, H_kv, T) float32.
    """
    (batch, heads, count, _), (kv_heads, tokens) = queries.shape, keys.shape[1:3]
    transposed = keys.float().transpose(-1, -2) * scaling
    columns = columns_of(keys)[0]
    total = torch.zeros(batch, kv_heads, tokens, device=keys.device)
    for start in range(0, count, _QUERIES_AT_ONCE):
        block = queries[:, :, start : start + _QUERIES_AT_ONCE].float().unflatten(1, (kv_heads, -1))
        places = tokens - count + start + torch.arange(block.shape[3], device=keys.device)
        allowed = columns <= places[:, None]
        if valid is not None:
            allowed = allowed & valid[:, None, None, None]
        logits = (block.flatten(2, 3) @ transposed).unflatten(2, block.shape[2:4])
        # Not -inf: a query of padding may attend to nothing, which must not become NaN.
        attention = logits.masked_fill_(~allowed, torch.finfo(logits.dtype).min).softmax(dim=-1)
        total += attention.sum(dim=(2, 3))
    return total * (kv_heads / (heads * count))
