"""Scores of any size as scores that a window can be kept above."""

import torch

from mmshiftkv.methods.window import in_window


def scaled(scores: torch.Tensor, keys: torch.Tensor, window: int, valid: torch.Tensor | None) -> torch.Tensor:
    """Scores divided by the highest of their row and head: 0 to 1, in the same order.

    Args:
        scores: (B, H_kv, T) float32, not negative.
        keys: (B, H_kv, T, D).
        window: last tokens, which are neither looked at nor scored: they get 0.
        valid: (B, T) bool, False for padding, which gets 0 too; None when there is none.

    Returns:
        (B, H_kv, T) float32.
    """
    ignored = in_window(keys, window)[:, None]
    if valid is not None:
        ignored = ignored | ~valid[:, None]
    scores = scores.masked_fill(ignored, 0)
    return scores / scores.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
