"""The public operations of a decoding step; otherwise as `ops`."""

import math
from collections.abc import Sequence

import torch

from . import reference
from .checks import check_alike, check_contiguous, check_device, check_dtype, check_shape
from .device import no_product_of, takes_triton
from .sizes import MOST_ROWS


def project_token(
    state: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> list[torch.Tensor]:
    """Linear layers (N, K) that share a few rows of states (..., K); each has its own N, and a bias (N,) or None.

    Of one row, a root mean square norm, the weight (K,) and epsilon of which are given, may stand before them, and to
    the output of a single layer a residual (..., N) may be added.
    """
    _check_layers(state, weights, biases)
    if norm is not None:
        _check_norm(state, *norm)
    if residual is not None:
        _check_one_row("residual", state)
        if len(weights) != 1:
            raise ValueError(f"residual is added to the output of one layer, weights has {len(weights)} entries")
        check_shape("residual", residual, "(..., N)", (*state.shape[:-1], weights[0].shape[0]))
        check_alike("residual", residual, "state", state)
    if takes_triton(backend, state.device, unless=no_product_of(state.dtype)):
        from .fused.project_token import project_token as fused

        return fused(state, weights, biases, norm, residual)
    return reference.project_token(state, weights, biases, norm, residual)


def project_gate(
    state: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    norm: tuple[torch.Tensor, float] | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """SiLU of one linear layer of one row times another (..., N): two weights (N, K) and biases, and a norm or None."""
    if len(weights) != 2:
        raise ValueError(f"weights has {len(weights)} entries, must have two: of the gate and of what it multiplies")
    _check_layers(state, weights, biases)
    _check_one_row("weights of a gate", state)
    check_shape("weights[1]", weights[1], "(N, K)", weights[0].shape)
    if norm is not None:
        _check_norm(state, *norm)
    if takes_triton(backend, state.device, unless=no_product_of(state.dtype)):
        from .fused.project_gate import project_gate as fused

        return fused(state, weights, biases, norm)
    return reference.project_gate(state, weights, biases, norm)


def _check_layers(
    state: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
) -> None:
    if state.dim() == 0 or state.numel() == 0 or state.numel() > MOST_ROWS * state.shape[-1]:
        raise ValueError(f"state has shape {tuple(state.shape)}, must be (..., K) with 1 to {MOST_ROWS} rows in all")
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries, must have one for each of the {len(weights)} weights")
    check_contiguous("state", state)
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_shape(f"weights[{index}]", weight, "(N, K)", (None, state.shape[-1]))
        check_alike(f"weights[{index}]", weight, "state", state)
        if bias is not None:
            check_shape(f"biases[{index}]", bias, "(N,)", weight.shape[:1])
            check_alike(f"biases[{index}]", bias, "state", state)


def _check_norm(state: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    _check_one_row("norm", state)
    check_shape("norm[0]", weight, "(K,)", state.shape[-1:])
    check_alike("norm[0]", weight, "state", state)
    if not 0 <= eps < math.inf:
        raise ValueError(f"norm[1]={eps!r} must be at least 0, and finite")


def _check_one_row(name: str, state: torch.Tensor) -> None:
    if state.numel() != state.shape[-1]:
        raise ValueError(f"{name}: state has shape {tuple(state.shape)}, must have one row")


def attend_token(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """What one token's query (B, H, 1, D) gets from slots of keys and values: (B, H, 1, D_V)."""
    check_shape("query", query, "(B, H, 1, D)", (None, None, 1, None))
    batch, heads, _, head_dim = query.shape
    check_shape("keys", keys, "(B, H_kv, S, D)", (batch, None, None, head_dim))
    check_shape("values", values, "(B, H_kv, S, D_V)", (*keys.shape[:3], None))
    if heads % keys.shape[1]:
        raise ValueError(f"query has {heads} heads, must have a multiple of the {keys.shape[1]} heads of keys")
    for name, tensor in (("keys", keys), ("values", values)):
        check_dtype(name, tensor, query.dtype)
        check_device(name, tensor, "query", query)
    for name, tensor in (("query", query), ("keys", keys), ("values", values)):
        if tensor.stride(3) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}, must have 1 in the last place")
    if mask is not None:
        check_shape("mask", mask, "(B or 1, 1, 1, S)", (1 if mask.shape[:1] == (1,) else batch, 1, 1, keys.shape[2]))
        check_dtype("mask", mask, torch.bool, query.dtype)
        check_device("mask", mask, "query", query)
        check_contiguous("mask", mask)
    if takes_triton(backend, query.device, unless=no_product_of(query.dtype)):
        from .fused.attend_token import attend_token as fused

        return fused(query, keys, values, mask, scale)
    return reference.attend_token(query, keys, values, mask, scale)
