"""Which tokens are kept, and what is stored of them (method, step 6)."""

import torch

from .attention import finite


def keep_best(
    scores: torch.Tensor,
    count: int,
    valid: torch.Tensor | None = None,
    *,
    not_finite: torch.Tensor | None = None,
) -> torch.Tensor:
    """The last token and the `count - 1` others with the highest scores (method, step 6).

    Of tokens with equal scores the earlier one is kept; scores that are not finite come last.  Padding is kept only
    where a row has fewer valid tokens than `count`, and then the padding nearest to them, so that the kept columns line
    up with the end of a padding mask.

    Args:
        scores: (B, H_kv, T) float32, not negative.
        count: tokens to keep, from 1 to T.
        valid: (B, T) bool, left-padded; None when there is no padding.
        not_finite: (1,) bool, set to True if a token that is no padding has a score that is not finite.

    Returns:
        (B, H_kv, count) int64, ascending.
    """
    tokens = scores.shape[-1]
    is_finite = scores.isfinite()
    if not_finite is not None:
        not_finite |= (~is_finite if valid is None else ~is_finite & valid[:, None]).any()
    scores = scores.where(is_finite, -0.5)
    if valid is not None:
        # From -T to -1, below all scores.
        nearness = torch.arange(tokens, device=scores.device, dtype=scores.dtype) - tokens
        scores = torch.where(valid[:, None, :], scores, nearness)
    order = scores[..., :-1].sort(dim=-1, descending=True, stable=True).indices
    kept = order[..., : count - 1].sort(dim=-1).values
    return torch.nn.functional.pad(kept, (0, 1), value=tokens - 1)


def gather(
    keys: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    valid: torch.Tensor | None = None,
    not_finite: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept keys and values, in storage of their own.

    Args:
        keys: (B, H_kv, T, D).
        values: (B, H_kv, T, D_v).
        indices: (B, H_kv, C) int64.
        out: keys (B, H_kv, S, D) and values (B, H_kv, S, D_v) to write to, S >= C, contiguous, of the inputs' dtype
            and device, sharing no memory with them.  The slots from C on are set to 0, whatever they held: attention
            gives empty slots no weight, but no weight times NaN is NaN.  None: new storage of C slots.
        valid: (B, T) bool, False for padding; None when there is none.
        not_finite: (1,) bool, set to True if one of these tokens that is no padding has numbers that are not finite.

    Returns:
        `out`, or new keys (B, H_kv, C, D) and values (B, H_kv, C, D_v), contiguous, of the inputs' dtype.  Numbers that
        are not finite become 0.
    """
    kept_keys, kept_values = gather_rows(keys, indices), gather_rows(values, indices)
    if not_finite is not None:
        is_broken = ~(keys.isfinite().all(dim=-1) & values.isfinite().all(dim=-1)).gather(2, indices)
        if valid is not None:
            is_broken = is_broken & valid[:, None].expand(-1, keys.shape[1], -1).gather(2, indices)
        not_finite |= is_broken.any()
    if out is None:
        return kept_keys, kept_values
    return _store(kept_keys, out[0]), _store(kept_values, out[1])


def gather_rows(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The tokens `indices`, (B, H_kv, C), of states (B, H_kv, T, D); numbers that are not finite become 0."""
    return finite(states.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1])))


def _store(kept: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
    count = kept.shape[2]
    storage[:, :, :count] = kept
    storage[:, :, count:] = 0
    return storage
