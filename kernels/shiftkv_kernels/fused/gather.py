"""The kept keys and values, copied into storage of their own in one launch."""

import torch
import triton
import triton.language as tl

from ..launching import launch
from ..sizes import divided_up, next_power_of_2
from .finite import finite

_SLOTS_PER_PROGRAM = 16


@triton.jit
def _copy_rows(p_from, p_to, token, slot, C, S, stride_t, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copies the row of each token to its slot, and zeros to the slots from C on; what is not finite becomes 0.

    Returns:
        Which of the rows were not finite.
    """
    d = tl.cast(tl.arange(0, BLOCK_D), tl.int64)[None, :]
    token, slot = token[:, None], slot[:, None]
    rows = tl.load(p_from + token * stride_t + d * stride_d, mask=(slot < C) & (d < D), other=0)
    tl.store(p_to + slot * D + d, finite(rows), mask=(slot < S) & (d < D))
    return tl.max(tl.where(tl.abs(rows) < float("inf"), 0, 1), 1)


@triton.jit(do_not_specialize=["C", "S", "stride_mb"])
def _gather_kernel(
    p_keys,
    p_values,
    p_indices,
    p_kept_keys,
    p_kept_values,
    p_valid,
    p_not_finite,
    C,
    S,
    H_KV,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_mb,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
):
    """Fills BLOCK_S slots for keys and for values of one KV head."""
    pair = tl.cast(tl.program_id(1), tl.int64)
    batch, kv_head = pair // H_KV, pair % H_KV
    slot = tl.cast(tl.program_id(0), tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    token = tl.load(p_indices + pair * C + slot, mask=slot < C, other=0)
    p_keys += batch * stride_kb + kv_head * stride_kh
    p_values += batch * stride_vb + kv_head * stride_vh
    p_kept_keys += pair * S * D
    p_kept_values += pair * S * D_V
    is_broken = _copy_rows(p_keys, p_kept_keys, token, slot, C, S, stride_kt, stride_kd, D, BLOCK_D)
    is_broken |= _copy_rows(p_values, p_kept_values, token, slot, C, S, stride_vt, stride_vd, D_V, BLOCK_D_V)
    if p_not_finite is not None:
        if p_valid is not None:
            is_valid = tl.load(p_valid + batch * stride_mb + token, mask=slot < C, other=0) != 0
            is_broken = tl.where(is_valid, is_broken, 0)
        # All programs that store anything store the same.
        tl.store(p_not_finite, tl.cast(1, tl.uint8), mask=tl.max(is_broken, 0) > 0)


def gather(
    keys: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    valid: torch.Tensor | None = None,
    not_finite: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.gather`, on a GPU."""
    batch, kv_heads, _, head_dim = keys.shape
    value_dim, count = values.shape[-1], indices.shape[-1]
    if out is None:
        rows = (batch, kv_heads, count)
        out = keys.new_empty((*rows, head_dim)), values.new_empty((*rows, value_dim))
    kept_keys, kept_values = out
    slots = kept_keys.shape[2]
    with torch.cuda.device_of(keys):
        launch(
            _gather_kernel,
            (divided_up(slots, _SLOTS_PER_PROGRAM), batch * kv_heads),
            keys,
            values,
            indices.contiguous(),
            kept_keys,
            kept_values,
            None if valid is None else valid.contiguous().view(torch.uint8),
            None if not_finite is None else not_finite.view(torch.uint8),
            count,
            slots,
            kv_heads,
            *keys.stride(),
            *values.stride(),
            keys.shape[2],
            D=head_dim,
            D_V=value_dim,
            BLOCK_S=_SLOTS_PER_PROGRAM,
            BLOCK_D=next_power_of_2(head_dim),
            BLOCK_D_V=next_power_of_2(value_dim),
        )
    return kept_keys, kept_values
