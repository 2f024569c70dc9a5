"""The prompt's last tokens as a window that observes the others: its attention, and scores that keep it."""

from collections.abc import Iterator

import torch

from shiftkv_kernels.reference.attention import soft_capped, softmax_with_sinks

from .columns import columns_of

_QUERIES_AT_ONCE = 16  # bounds the attention, (B, H, so many, T) float32


def window_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Causal attention of the last n tokens, a few of them at a time.

    Args:
        queries: (B, H, n, D), rotated, of the last n of T tokens.
        keys: (B, H_kv, T, D).
        scaling: factor on the logits.
        valid: (B, T) bool, or None.  Where a query is padding, its row's tokens all lie in the window, and what they
            get says nothing; it is finite.
        softcap: logits x become softcap * tanh(x / softcap); None: they are not capped.
        sinks: (H,), learned sinks, a logit of each query head to which mass goes that no token gets; None: none.

    Yields:
        (B, H_kv, r, m, T) float32 for the next m queries, r query heads sharing a KV head.
    """
    (count, tokens), kv_heads = (queries.shape[2], keys.shape[2]), keys.shape[1]
    transposed = keys.float().transpose(-1, -2) * scaling
    by_head = None if sinks is None else sinks.float().reshape(kv_heads, -1, 1, 1)
    columns = columns_of(keys)[0]
    for start in range(0, count, _QUERIES_AT_ONCE):
        block = queries[:, :, start : start + _QUERIES_AT_ONCE].float().unflatten(1, (kv_heads, -1))
        places = tokens - count + start + torch.arange(block.shape[3], device=keys.device)
        allowed = columns <= places[:, None]
        if valid is not None:
            allowed = allowed & valid[:, None, None, None]
        logits = soft_capped(block.flatten(2, 3) @ transposed, softcap).unflatten(2, block.shape[2:4])
        # Not -inf: a query of padding may attend to nothing, which must not become NaN.
        yield softmax_with_sinks(logits.masked_fill_(~allowed, torch.finfo(logits.dtype).min), by_head)


def in_window(keys: torch.Tensor, window: int) -> torch.Tensor:
    """(1, T) bool: the last `window` of the T columns of keys (B, H_kv, T, D)."""
    return columns_of(keys) >= keys.shape[2] - window


def keep_window(scores: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """The scores (B, H_kv, T), which are at most 1, and above them those of the window: the later the higher."""
    return torch.where(in_window(keys, window), (columns_of(keys) + 2).float(), scores)
