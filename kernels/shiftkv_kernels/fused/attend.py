"""What queries behind a prompt get from it, in one pass over its keys and values (method, "Counting values").

A launch goes over parts of the tokens; where there are several, a small one combines them.  Exponentials are in base 2.
"""

import math

import torch
import triton
import triton.language as tl

from ..device import gpu_of
from .finite import load_finite
from .log_sums import LARGEST_LOGIT, LOWEST
from .products import tile_products
from .tiles import Tiles, choose_attend_tiles, split

_COMBINED_ROWS = 16


@triton.jit(do_not_specialize=["T", "tiles_per_part", "stride_mb"])
def _attend_kernel(
    p_queries,
    p_keys,
    p_values,
    p_valid,
    p_outputs,
    p_sums,
    N,
    T,
    H_KV,
    tiles_per_part,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_mb,
    R: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Outputs of a block of queries of one head over a part of the tokens, and the logarithms of their sums."""
    block, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, kv_head = tl.cast(pair // H_KV, tl.int64), tl.cast(pair % H_KV, tl.int64)
    blocks_per_head = tl.cdiv(N, BLOCK_Q)
    head = block // blocks_per_head
    rows = (block - head * blocks_per_head) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_rows = rows < N
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    p_q = p_queries + batch * stride_qb + (kv_head * R + head) * stride_qh
    p_q += tl.cast(rows, tl.int64)[:, None] * stride_qn
    b_q = None
    if not EXACT:
        b_q = tl.load(p_q + d[None, :], mask=m_rows[:, None] & (d < D)[None, :], other=0.0)
    p_k = p_keys + batch * stride_kb + kv_head * stride_kh
    p_v = p_values + batch * stride_vb + kv_head * stride_vh
    if p_valid is not None:
        p_valid += batch * stride_mb
    largest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    outputs = tl.zeros([BLOCK_Q, BLOCK_D_V], tl.float32)
    begin = part * tiles_per_part * BLOCK_T
    end = tl.minimum(begin + tiles_per_part * BLOCK_T, T)
    for start in range(begin, end, BLOCK_T):
        token = start + t
        m_t = token < end
        p_tile = p_k + tl.cast(token, tl.int64)[None, :] * stride_kt
        logits = tile_products(b_q, p_q, m_rows, 1, p_tile, m_t, stride_kd, D)
        m_attended = m_t
        if p_valid is not None:
            m_attended &= tl.load(p_valid + token, mask=m_t, other=0) != 0
        logits = tl.where(m_attended[None, :] & (tl.abs(logits) < LARGEST_LOGIT), logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1) * scale)
        weights = tl.exp2(tl.fma(logits, scale, -larger[:, None]))
        rescale = tl.exp2(largest - larger)
        largest, total = larger, total * rescale + tl.sum(weights, 1)
        b_v = load_finite(p_v, token, m_t, stride_vt, stride_vd, D_V, BLOCK_D_V)
        outputs *= rescale[:, None]
        outputs = tl.dot(tl.cast(weights, b_v.dtype), b_v, outputs, input_precision="ieee" if EXACT else None)
    outputs /= tl.where(total > 0, total, 1.0)[:, None]
    first_row = (tl.cast(part, tl.int64) * tl.num_programs(2) + pair) * R * N + tl.cast(head, tl.int64) * N
    d_v = tl.arange(0, BLOCK_D_V)
    p_out = p_outputs + (first_row + rows)[:, None] * D_V + d_v[None, :]
    tl.store(p_out, outputs, mask=m_rows[:, None] & (d_v < D_V)[None, :])
    tl.store(p_sums + first_row + rows, largest + tl.log2(total), mask=m_rows)


@triton.jit
def _combine_kernel(p_parts, p_sums, p_outputs, rows, D_V: tl.constexpr, BLOCK_D_V: tl.constexpr, PARTS: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """The outputs over all tokens, from those over parts of them."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D_V)
    m_row = row < rows
    mask = m_row[:, None] & (d < D_V)[None, :]
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    for part in tl.static_range(PARTS):
        largest = tl.maximum(largest, tl.load(p_sums + part * rows + row, mask=m_row, other=0.0))
    total = tl.zeros([BLOCK], tl.float32)
    outputs = tl.zeros([BLOCK, BLOCK_D_V], tl.float32)
    for part in tl.static_range(PARTS):
        share = tl.exp2(tl.load(p_sums + part * rows + row, mask=m_row, other=0.0) - largest)
        total += share
        o_row = (part * rows + row)[:, None] * D_V + d[None, :]
        outputs += share[:, None] * tl.load(p_parts + o_row, mask=mask, other=0.0)
    outputs /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(p_outputs + row[:, None] * D_V + d[None, :], outputs, mask=mask)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """As `reference.attend`, on a GPU: float32, bfloat16 or float16, head dims up to 256, positive scaling.

    Args:
        tiles: to measure others than the built-in ones.
    """
    batch, heads, count, head_dim = queries.shape
    kv_heads, tokens, value_dim = values.shape[1:]
    if queries.stride(-1) != 1:
        queries = queries.contiguous()
    per_head, pairs, rows = heads // kv_heads, batch * kv_heads, batch * heads * count
    blocks_d = [max(triton.next_power_of_2(size), 16) for size in (head_dim, value_dim)]
    gpu = gpu_of(keys.device)
    tiles = tiles or choose_attend_tiles(max(blocks_d), keys.element_size(), gpu)
    blocks = per_head * triton.cdiv(count, tiles.kept)
    parts, tiles_per_part = split(blocks * pairs, triton.cdiv(tokens, tiles.streamed), gpu.multiprocessors)
    by_part = keys.new_empty((parts, batch, heads, count, value_dim), dtype=torch.float32)
    sums = keys.new_empty((parts, rows), dtype=torch.float32)
    with torch.cuda.device_of(keys):
        _attend_kernel[blocks, parts, pairs](
            queries,
            keys,
            values,
            None if valid is None else valid.contiguous().view(torch.uint8),
            by_part,
            sums,
            count,
            tokens,
            kv_heads,
            tiles_per_part,
            scaling / math.log(2),
            *queries.stride()[:3],
            *keys.stride(),
            *values.stride(),
            tokens,
            R=per_head,
            D=head_dim,
            D_V=value_dim,
            BLOCK_D=blocks_d[0],
            BLOCK_D_V=blocks_d[1],
            EXACT=keys.dtype == torch.float32,
            BLOCK_Q=tiles.kept,
            BLOCK_T=tiles.streamed,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if parts == 1:
            return by_part[0]
        outputs = keys.new_empty(by_part.shape[1:], dtype=torch.float32)
        _combine_kernel[(triton.cdiv(rows, _COMBINED_ROWS),)](
            by_part, sums, outputs, rows, D_V=value_dim, BLOCK_D_V=blocks_d[1], PARTS=parts, BLOCK=_COMBINED_ROWS
        )
    return outputs
