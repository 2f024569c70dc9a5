"""Where the tokens of a left-padded prompt are."""

import torch


def columns_of(keys: torch.Tensor) -> torch.Tensor:
    """The numbers 0..T-1 of the columns of keys (B, H_kv, T, D), as (1, T)."""
    return torch.arange(keys.shape[2], device=keys.device)[None]


def first_tokens(keys: torch.Tensor, valid: torch.Tensor | None, count: int) -> torch.Tensor:
    """(B or 1, T) bool: the first `count` tokens of each row, those behind its padding."""
    columns = columns_of(keys)
    if valid is None:
        return columns < count
    return valid & (columns < (~valid).sum(dim=1, keepdim=True) + count)
