"""The kept keys and values, copied into storage of their own in one launch."""

import torch
import triton
import triton.language as tl

_ROWS_PER_PROGRAM = 16


@triton.jit
def _copy_rows(p_from, p_to, token, m_row, slot, stride_t, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = m_row[:, None] & (d < D)[None, :]
    rows = tl.load(p_from + token[:, None] * stride_t + d[None, :] * stride_d, mask=mask)
    tl.store(p_to + tl.cast(slot, tl.int64)[:, None] * D + d[None, :], rows, mask=mask)


@triton.jit(do_not_specialize=["C", "CAPACITY"])
def _gather_kernel(
    p_keys,
    p_values,
    p_indices,
    p_kept_keys,
    p_kept_values,
    C,
    CAPACITY,
    H_KV,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
):
    """Copies BLOCK_C rows of keys and of values of one KV head."""
    pair = tl.cast(tl.program_id(1), tl.int64)
    batch, kv_head = pair // H_KV, pair % H_KV
    slot = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_slot = slot < C
    token = tl.load(p_indices + pair * C + slot, mask=m_slot, other=0)
    p_keys += batch * stride_kb + kv_head * stride_kh
    p_values += batch * stride_vb + kv_head * stride_vh
    p_kept_keys += pair * CAPACITY * D
    p_kept_values += pair * CAPACITY * D_V
    _copy_rows(p_keys, p_kept_keys, token, m_slot, slot, stride_kt, stride_kd, D, BLOCK_D)
    _copy_rows(p_values, p_kept_values, token, m_slot, slot, stride_vt, stride_vd, D_V, BLOCK_D_V)


def gather(
    keys: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, *, capacity: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.gather`, on a GPU."""
    batch, kv_heads, _, head_dim = keys.shape
    value_dim, count = values.shape[-1], indices.shape[-1]
    slots = count if capacity is None else capacity
    kept_keys = keys.new_empty((batch, kv_heads, slots, head_dim))
    kept_values = values.new_empty((batch, kv_heads, slots, value_dim))
    with torch.cuda.device_of(keys):
        _gather_kernel[triton.cdiv(count, _ROWS_PER_PROGRAM), batch * kv_heads](
            keys,
            values,
            indices.contiguous(),
            kept_keys,
            kept_values,
            count,
            slots,
            kv_heads,
            *keys.stride(),
            *values.stride(),
            D=head_dim,
            D_V=value_dim,
            BLOCK_C=_ROWS_PER_PROGRAM,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_D_V=triton.next_power_of_2(value_dim),
        )
    return kept_keys, kept_values
