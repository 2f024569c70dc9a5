"""Values refitted to the tokens that are kept (method, "Counting values"), without waiting for the device.

1. The queries' attention to the kept tokens, and what these do not give them of their outputs.
2. The products of that attention with itself and with what is missing.
3. Conjugate gradients, for a few features at a time.
"""

import math

import torch
import triton
import triton.language as tl

from ..reference.values import LEAST_SHARE as _LEAST_SHARE
from .finite import finite, load_finite, load_rows
from .log_sums import LARGEST_LOGIT, LOWEST
from .products import tile_products

LEAST_SHARE = tl.constexpr(_LEAST_SHARE)
_ROWS, _KEPT, _FEATURES, _PRODUCTS = 64, 64, 16, 32


@triton.jit
def _logits_of_kept(
    b_q, p_q, m_rows, p_k, p_kept, p_valid, c, C, stride_kt, stride_kd, scale, D: tl.constexpr
):  # fmt: skip
    """Logits in base 2 of queries and the kept tokens c, -inf where there is none, padding or no finite key."""
    m_c = c < C
    token = tl.load(p_kept + c, mask=m_c, other=0)
    logits = tile_products(b_q, p_q, m_rows, 1, p_k + token[None, :] * stride_kt, m_c, stride_kd, D)
    if p_valid is not None:
        m_c &= tl.load(p_valid + token, mask=m_c, other=0) != 0
    return tl.where(m_c[None, :] & (tl.abs(logits) < LARGEST_LOGIT), logits * scale, float("-inf"))


@triton.jit(do_not_specialize=["C", "stride_mb"])
def _missing_kernel(
    p_queries,
    p_outputs,
    p_keys,
    p_values,
    p_valid,
    p_kept,
    p_attention,
    p_missing,
    N,
    C,
    H_KV,
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
    BLOCK_C: tl.constexpr,
):
    """Attention of a block of query rows to the kept tokens, and their outputs less what these give."""
    pair = tl.cast(tl.program_id(1), tl.int64)
    batch, kv_head = pair // H_KV, pair % H_KV
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_rows = row < R * N
    p_q = p_queries + batch * stride_qb + kv_head * R * stride_qh
    p_q += tl.cast(row // N, tl.int64)[:, None] * stride_qh + tl.cast(row % N, tl.int64)[:, None] * stride_qn
    b_q = None
    if not EXACT:
        d = tl.arange(0, BLOCK_D)
        b_q = tl.load(p_q + d[None, :], mask=m_rows[:, None] & (d < D)[None, :], other=0.0)
    p_k = p_keys + batch * stride_kb + kv_head * stride_kh
    p_v = p_values + batch * stride_vb + kv_head * stride_vh
    p_kept += pair * C
    if p_valid is not None:
        p_valid += batch * stride_mb
    largest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        logits = _logits_of_kept(b_q, p_q, m_rows, p_k, p_kept, p_valid, c, C, stride_kt, stride_kd, scale, D)
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(logits - larger[:, None]), 1)
        largest = larger
    shift = tl.where(total > 0, largest + tl.log2(total), 0.0)
    given = tl.zeros([BLOCK_Q, BLOCK_D_V], tl.float32)
    p_attention += (pair * R * N + row)[:, None] * C
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        logits = _logits_of_kept(b_q, p_q, m_rows, p_k, p_kept, p_valid, c, C, stride_kt, stride_kd, scale, D)
        weights = tl.exp2(logits - shift[:, None])
        tl.store(p_attention + c[None, :], weights, mask=m_rows[:, None] & (c < C)[None, :])
        token = tl.load(p_kept + c, mask=c < C, other=0)
        b_v = tl.cast(load_finite(p_v, token, c < C, stride_vt, stride_vd, D_V, BLOCK_D_V), tl.float32)
        given = tl.dot(weights, b_v, given, input_precision="ieee" if EXACT else "tf32x3")
    outputs = load_rows(p_outputs + pair * R * N * D_V, row, m_rows, D_V, 1, D_V, BLOCK_D_V)
    d_v = tl.arange(0, BLOCK_D_V)
    p_out = p_missing + (pair * R * N + row)[:, None] * D_V + d_v[None, :]
    tl.store(p_out, outputs - given, mask=m_rows[:, None] & (d_v < D_V)[None, :])


@triton.jit(do_not_specialize=["C"])
def _products_kernel(
    p_attention,
    p_missing,
    p_gram,
    p_right,
    rows,
    C,
    D_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of the products of the attention's columns with each other or, the last tiles, with what is missing."""
    pair = tl.cast(tl.program_id(2), tl.int64)
    left = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tiles = tl.cdiv(C, BLOCK)
    is_gram = tl.program_id(1) < tiles
    width = tl.where(is_gram, C, D_V)
    right = (tl.program_id(1) - tl.where(is_gram, 0, tiles)) * BLOCK + tl.arange(0, BLOCK)
    p_attention += pair * rows * C
    p_other = tl.where(is_gram, p_attention, p_missing + pair * rows * D_V)
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = tl.cast(start + tl.arange(0, BLOCK_R), tl.int64)
        m_row = row < rows
        b_left = tl.load(
            p_attention + row[None, :] * C + left[:, None], mask=m_row[None, :] & (left < C)[:, None], other=0.0
        )
        b_right = tl.load(
            p_other + row[:, None] * width + right[None, :], mask=m_row[:, None] & (right < width)[None, :], other=0.0
        )
        products = tl.dot(b_left, b_right, products, input_precision="tf32x3")
    p_out = tl.where(is_gram, p_gram + pair * C * C, p_right + pair * C * D_V)
    p_out += tl.cast(left, tl.int64)[:, None] * width + right[None, :]
    tl.store(p_out, products, mask=(left < C)[:, None] & (right < width)[None, :])


@triton.jit(do_not_specialize=["C"])
def _solve_kernel(
    p_gram,
    p_residual,
    p_direction,
    p_product,
    p_change,
    p_values,
    p_kept,
    p_refitted,
    C,
    H_KV,
    ridge,
    steps,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    D_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Conjugate gradients for BLOCK_D features; at first `p_residual` holds the right side.

    A barrier stands wherever threads read what others wrote.
    """
    pair = tl.cast(tl.program_id(1), tl.int64)
    batch, kv_head = pair // H_KV, pair % H_KV
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    block = tl.arange(0, BLOCK_C)
    p_gram += pair * C * C
    o_pair = pair * C * D_V + d[None, :]
    size = tl.zeros([BLOCK_D], tl.float32)
    trace = tl.zeros([BLOCK_C], tl.float32)
    counts = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + block
        offset = o_pair + tl.cast(c, tl.int64)[:, None] * D_V
        mask = (c < C)[:, None] & (d < D_V)[None, :]
        right = tl.load(p_residual + offset, mask=mask, other=0.0)
        tl.store(p_direction + offset, right, mask=mask)
        tl.store(p_change + offset, tl.zeros_like(right), mask=mask)
        size += tl.sum(right * right, 0)
        square = tl.load(p_gram + tl.cast(c, tl.int64) * (C + 1), mask=c < C, other=0.0)
        trace += square
        counts += tl.where(square > 0, 1.0, 0.0)
    count = tl.maximum(tl.sum(counts, 0), 1.0)
    least = LEAST_SHARE * tl.sum(trace, 0) / count
    logarithms = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + block
        square = tl.load(p_gram + tl.cast(c, tl.int64) * (C + 1), mask=c < C, other=0.0)
        logarithms += tl.where(square > 0, tl.log(tl.maximum(square, least)), 0.0)
    penalty = ridge * tl.exp(tl.sum(logarithms, 0) / count)
    tl.debug_barrier()
    for _ in range(steps):
        curvature = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + block
            offset = o_pair + tl.cast(c, tl.int64)[:, None] * D_V
            mask = (c < C)[:, None] & (d < D_V)[None, :]
            product = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
            for other in range(0, C, BLOCK_C):
                k = tl.cast(other + block, tl.int64)
                m_k = k < C
                p_tile = p_gram + tl.cast(c, tl.int64)[:, None] * C + k[None, :]
                gram = tl.load(p_tile, mask=(c < C)[:, None] & m_k[None, :], other=0.0)
                p_part = p_direction + o_pair + k[:, None] * D_V
                part = tl.load(p_part, mask=m_k[:, None] & (d < D_V)[None, :], other=0.0)
                product = tl.dot(gram, part, product, input_precision="tf32x3")
            direction = tl.load(p_direction + offset, mask=mask, other=0.0)
            product += penalty * direction
            tl.store(p_product + offset, product, mask=mask)
            curvature += tl.sum(direction * product, 0)
        # Where nothing is left, or nothing is there, nothing changes.
        length = tl.where(curvature > 0, size / tl.where(curvature > 0, curvature, 1.0), 0.0)[None, :]
        tl.debug_barrier()
        smaller = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + block
            offset = o_pair + tl.cast(c, tl.int64)[:, None] * D_V
            mask = (c < C)[:, None] & (d < D_V)[None, :]
            direction = tl.load(p_direction + offset, mask=mask, other=0.0)
            change = tl.load(p_change + offset, mask=mask, other=0.0) + length * direction
            residual = tl.load(p_residual + offset, mask=mask, other=0.0)
            residual -= length * tl.load(p_product + offset, mask=mask, other=0.0)
            tl.store(p_change + offset, change, mask=mask)
            tl.store(p_residual + offset, residual, mask=mask)
            smaller += tl.sum(residual * residual, 0)
        turn = tl.where(size > 0, smaller / tl.where(size > 0, size, 1.0), 0.0)[None, :]
        size = smaller
        tl.debug_barrier()
        for start in range(0, C, BLOCK_C):
            c = start + block
            offset = o_pair + tl.cast(c, tl.int64)[:, None] * D_V
            mask = (c < C)[:, None] & (d < D_V)[None, :]
            residual = tl.load(p_residual + offset, mask=mask, other=0.0)
            direction = residual + turn * tl.load(p_direction + offset, mask=mask, other=0.0)
            tl.store(p_direction + offset, direction, mask=mask)
        tl.debug_barrier()
    p_v = p_values + batch * stride_vb + kv_head * stride_vh + tl.cast(d, tl.int64)[None, :] * stride_vd
    for start in range(0, C, BLOCK_C):
        c = start + block
        offset = o_pair + tl.cast(c, tl.int64)[:, None] * D_V
        mask = (c < C)[:, None] & (d < D_V)[None, :]
        token = tl.load(p_kept + pair * C + c, mask=c < C, other=0)
        values = finite(tl.load(p_v + token[:, None] * stride_vt, mask=mask, other=0.0))
        change = tl.load(p_change + offset, mask=mask, other=0.0)
        tl.store(p_refitted + offset, tl.cast(values, tl.float32) + change, mask=mask)


def refit_values(
    queries: torch.Tensor,
    outputs: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    *,
    scaling: float,
    ridge: float,
    steps: int,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.refit_values`, on a GPU: float32, bfloat16 or float16, head dims up to 256, positive scaling."""
    if queries.stride(-1) != 1:
        queries = queries.contiguous()
    kept = kept.contiguous()
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    with torch.cuda.device_of(keys):
        attention, missing = _missing(queries, outputs.contiguous(), keys, values, kept, scaling, valid)
        return _solve(*_products(attention, missing), values, kept, ridge, steps)


def _missing(
    queries: torch.Tensor,
    outputs: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (pairs, rows, C) and what is missing (pairs, rows, D_v), float32; a KV head's rows are neighbours."""
    batch, heads, count, head_dim = queries.shape
    kv_heads, tokens, value_dim = values.shape[1:]
    pairs, rows = batch * kv_heads, heads // kv_heads * count
    attention = keys.new_empty((pairs, rows, kept.shape[2]), dtype=torch.float32)
    missing = keys.new_empty((pairs, rows, value_dim), dtype=torch.float32)
    block_d, block_d_v = (max(triton.next_power_of_2(size), 16) for size in (head_dim, value_dim))
    is_wide = max(block_d, block_d_v) > 128
    _missing_kernel[triton.cdiv(rows, _ROWS), pairs](
        queries,
        outputs,
        keys,
        values,
        valid,
        kept,
        attention,
        missing,
        count,
        kept.shape[2],
        kv_heads,
        scaling / math.log(2),
        *queries.stride()[:3],
        *keys.stride(),
        *values.stride(),
        tokens,
        R=heads // kv_heads,
        D=head_dim,
        D_V=value_dim,
        BLOCK_D=block_d,
        BLOCK_D_V=block_d_v,
        EXACT=keys.dtype == torch.float32,
        BLOCK_Q=_ROWS,
        BLOCK_C=_KEPT // 2 if is_wide else _KEPT,
        num_warps=8 if is_wide else 4,
        num_stages=1,
    )
    return attention, missing


def _products(attention: torch.Tensor, missing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrix (pairs, C, C) of the attention, and its products with what is missing, (pairs, C, D_v)."""
    pairs, rows, count = attention.shape
    value_dim = missing.shape[2]
    gram = attention.new_empty((pairs, count, count))
    right = attention.new_empty((pairs, count, value_dim))
    left_tiles, value_tiles = triton.cdiv(count, _PRODUCTS), triton.cdiv(value_dim, _PRODUCTS)
    _products_kernel[left_tiles, left_tiles + value_tiles, pairs](
        attention, missing, gram, right, rows, count, D_V=value_dim, BLOCK_R=_ROWS, BLOCK=_PRODUCTS, num_warps=4
    )
    return gram, right


def _solve(
    gram: torch.Tensor, right: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, ridge: float, steps: int
) -> torch.Tensor:
    pairs, count, value_dim = right.shape
    work = right.new_empty((3, *right.shape))
    refitted = values.new_empty((*kept.shape, value_dim))
    _solve_kernel[triton.cdiv(value_dim, _FEATURES), pairs](
        gram,
        right,
        *work,
        values,
        kept,
        refitted,
        count,
        values.shape[1],
        ridge,
        steps,
        *values.stride(),
        D_V=value_dim,
        BLOCK_C=min(max(triton.next_power_of_2(count), 16), _KEPT),
        BLOCK_D=_FEATURES,
        num_warps=4,
    )
    return refitted
