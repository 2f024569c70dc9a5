"""What a decoding step does besides attention."""

from collections.abc import Sequence

import torch


def project_token(
    state: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Linear layers that share the states of one token of each row.

    Args:
        state: (..., K), 1 to 16 rows in all.
        weights: (N, K) each, with an N of its own.
        biases: (N,) or None for each of them.

    Returns:
        A (..., N) for each of them, of the inputs' dtype.
    """
    return [torch.nn.functional.linear(state, *parts) for parts in zip(weights, biases, strict=True)]


def attend_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of one token to slots; each group of H / H_kv query heads reads one key/value head.

    Args:
        query: (B, H, 1, D).
        keys: (B, H_kv, S, D).
        values: (B, H_kv, S, D_V).
        mask: (B or 1, 1, 1, S): True for the slots that are shown, of which each row needs one; or what is added to the
            logits, of the inputs' dtype.  None: all are shown.
        scale: of the logits.

    Returns:
        (B, H, 1, D_V), of the inputs' dtype.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
