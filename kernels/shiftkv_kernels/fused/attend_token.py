"""Attention of one token to the slots of a cache that are shown to it: hidden ones are not read.

Query heads read the keys and values of their group where they are.  One program for each head would leave most of a GPU
idle, so each takes a part of the slots, and a second launch puts the parts together; exponentials are in base 2.
"""

import math

import torch
import triton
import triton.language as tl

from ..launching import launch
from ..sizes import divided_up, next_power_of_2

_SLOTS_PER_PROGRAM = 64


@triton.jit
def _attend_part_kernel(
    p_query, p_keys, p_values, p_mask, p_parts, p_highest, p_totals, scale, heads, S,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    R: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, IS_ADDED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_V: tl.constexpr,
):  # fmt: skip
    """What one query head of one row gets from a part of the slots, relative to the highest logit in it."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row_offset, kv_offset = tl.cast(row, tl.int64), tl.cast(head // R, tl.int64)
    d, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D_V)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    shown = s < S
    if p_mask is not None:
        mask = tl.load(p_mask + row_offset * stride_mb + s, mask=shown, other=0)
        if not IS_ADDED:
            shown = shown & (mask != 0)
    query = tl.load(p_query + row_offset * stride_qb + head * stride_qh + d, mask=d < D, other=0).to(tl.float32)
    p_keys += row_offset * stride_kb + kv_offset * stride_kh
    p_values += row_offset * stride_vb + kv_offset * stride_vh
    places = tl.cast(s, tl.int64)[:, None]
    keys = tl.load(p_keys + places * stride_kt + d[None, :], mask=shown[:, None] & (d < D)[None, :], other=0)
    values = tl.load(p_values + places * stride_vt + d_v[None, :], mask=shown[:, None] & (d_v < D_V)[None, :], other=0)
    logits = tl.sum(keys.to(tl.float32) * (query * scale)[None, :], 1)
    if IS_ADDED:
        logits += mask.to(tl.float32) * 1.4426950408889634  # log2(e)
    logits = tl.where(shown, logits, -float("inf"))
    highest = tl.max(logits, 0)
    # Where nothing is shown there is nothing to be relative to.
    weights = tl.exp2(logits - tl.where(highest == -float("inf"), 0.0, highest))
    outputs = tl.sum(weights[:, None] * values.to(tl.float32), 0)
    part = tl.cast(tl.program_id(0), tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_highest + part, highest)
    tl.store(p_totals + part, tl.sum(weights, 0))
    tl.store(p_parts + part * D_V + d_v, outputs, mask=d_v < D_V)


@triton.jit
def _join_parts_kernel(
    p_parts, p_highest, p_totals, p_out, parts,
    D_V: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_D_V: tl.constexpr,
):  # fmt: skip
    """The output of one query head of one row."""
    head = tl.cast(tl.program_id(0), tl.int64)
    part, d_v = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_D_V)
    m_part, m_d_v = part < parts, d_v < D_V
    each = head * parts + part
    highest = tl.load(p_highest + each, mask=m_part, other=-float("inf"))
    totals = tl.load(p_totals + each, mask=m_part, other=0)
    outputs = tl.load(p_parts + each[:, None] * D_V + d_v[None, :], mask=m_part[:, None] & m_d_v[None, :], other=0)
    shares = tl.exp2(highest - tl.max(highest, 0))
    output = tl.sum(outputs * shares[:, None], 0) / tl.sum(totals * shares, 0)
    tl.store(p_out + head * D_V + d_v, output, mask=m_d_v)


def attend_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """As `reference.attend_token`, on a GPU."""
    batch, heads, _, head_dim = query.shape
    slots, value_dim = keys.shape[2], values.shape[3]
    is_bool = mask is not None and mask.dtype == torch.bool
    parts = divided_up(slots, _SLOTS_PER_PROGRAM)
    outputs = query.new_empty((batch, heads, parts, value_dim), dtype=torch.float32)
    highest, totals = (outputs.new_empty((batch, heads, parts)) for _ in range(2))
    out = query.new_empty((batch, heads, 1, value_dim))
    with torch.cuda.device_of(query):
        launch(
            _attend_part_kernel,
            (batch * heads, parts),
            query,
            keys,
            values,
            mask.view(torch.uint8) if mask is not None and is_bool else mask,
            outputs,
            highest,
            totals,
            scale * math.log2(math.e),
            heads,
            slots,
            *query.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            R=heads // keys.shape[1],
            D=head_dim,
            D_V=value_dim,
            IS_ADDED=mask is not None and not is_bool,
            BLOCK_S=_SLOTS_PER_PROGRAM,
            BLOCK_D=next_power_of_2(head_dim),
            BLOCK_D_V=next_power_of_2(value_dim),
        )
        launch(
            _join_parts_kernel,
            (batch * heads,),
            outputs,
            highest,
            totals,
            out,
            parts,
            D_V=value_dim,
            BLOCK_PARTS=next_power_of_2(parts),
            BLOCK_D_V=next_power_of_2(value_dim),
        )
    return out
