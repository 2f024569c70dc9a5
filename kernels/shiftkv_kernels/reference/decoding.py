"""What a decoding step does besides attention."""

from collections.abc import Sequence

import torch


def project_token(
    state: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Linear layers that share the states of one token of each row.

    Args:
        state: (..., K), 1 to 16 rows in all.
        weights: (N, K) each, with an N of its own.
        biases: (N,) or None for each of them.
        norm: the weight (K,) of a root mean square norm of the states in front of the layers, and the epsilon that is
            added to the mean of the squares; with one row only.
        residual: (..., N), added to the output of the only layer; with one row only.

    Returns:
        A (..., N) for each of them, of the inputs' dtype.
    """
    if norm is not None:
        state = _normed(state, *norm)
    outputs = [torch.nn.functional.linear(state, *parts) for parts in zip(weights, biases, strict=True)]
    return outputs if residual is None else [residual + output for output in outputs]


def project_gate(
    state: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """The inner part of a gated MLP: SiLU of a first linear layer, the gate, times a second one.

    Args:
        state: (..., K), one row in all.
        weights: two, (N, K) each: of the gate and of what it is multiplied with.
        biases: (N,) or None for each of them.
        norm: as that of `project_token`.

    Returns:
        (..., N), of the inputs' dtype.
    """
    gate, up = project_token(state, weights, biases, norm)
    return torch.nn.functional.silu(gate) * up


def _normed(state: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As Llama and the models after it round: the normed state first, then its product with the weight."""
    wide = state if state.dtype == torch.float64 else state.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(state.dtype)


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
