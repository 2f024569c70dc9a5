"""Conjugate gradients for refitted values, for a few features at a time; nothing waits for the device."""

import torch
import triton
import triton.language as tl

from ..launching import launch
from ..reference.values import LEAST_SHARE as _LEAST_SHARE
from ..sizes import divided_up, next_power_of_2
from .finite import finite

LEAST_SHARE = tl.constexpr(_LEAST_SHARE)
MOST_ON_CHIP = 128  # kept tokens whose products with each other stay with a program
_FEATURES = 16  # features that a program solves for: the fewest columns that a tile product can have
_ROWS_AT_ONCE, _KEPT_AT_ONCE = 256, 32


@triton.jit
def _penalty(p_gram, C, ridge, BLOCK_C: tl.constexpr):
    """The penalty on changes: `ridge` times the geometric mean of the squares, those of next to nothing raised."""
    sums, counts = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = tl.cast(start + tl.arange(0, BLOCK_C), tl.int64)
        square = tl.load(p_gram + c * (C + 1), mask=c < C, other=0.0)
        sums += square
        counts += tl.where(square > 0, 1.0, 0.0)
    count = tl.maximum(tl.sum(counts, 0), 1.0)
    least = LEAST_SHARE * tl.sum(sums, 0) / count
    logarithms = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = tl.cast(start + tl.arange(0, BLOCK_C), tl.int64)
        square = tl.load(p_gram + c * (C + 1), mask=c < C, other=0.0)
        logarithms += tl.where(square > 0, tl.log(tl.maximum(square, least)), 0.0)
    return ridge * tl.exp(tl.sum(logarithms, 0) / count)


@triton.jit
def _ratio(left, right):
    """left / right, 0 where right is not positive: where nothing is left, or nothing is there, nothing changes."""
    return tl.where(right > 0, left / tl.where(right > 0, right, 1.0), 0.0)


@triton.jit
def _store_refitted(p_v, p_kept, p_unchanged, p_refitted, change, c, d, C, stride_vt, D_V):
    """Stores the kept values with their changes, for the kept tokens c and the features d."""
    if p_unchanged is not None:
        change = tl.where(tl.load(p_unchanged) != 0, 0.0, change)
    mask = (c < C)[:, None] & (d < D_V)[None, :]
    token = tl.load(p_kept + c, mask=c < C, other=0)
    values = finite(tl.load(p_v + token[:, None] * stride_vt, mask=mask, other=0.0))
    tl.store(
        p_refitted + tl.cast(c, tl.int64)[:, None] * D_V + d[None, :], tl.cast(values, tl.float32) + change, mask=mask
    )


@triton.jit
def _solve_kernel(
    p_gram,
    p_right,
    p_values,
    p_kept,
    p_unchanged,
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
    """Conjugate gradients for BLOCK_D features of at most BLOCK_C kept tokens, all on the chip."""
    pair = tl.cast(tl.program_id(1), tl.int64)
    batch, kv_head = pair // H_KV, pair % H_KV
    c, d = tl.arange(0, BLOCK_C), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_c = c < C
    p_gram += pair * C * C
    gram = tl.load(p_gram + c[:, None] * C + c[None, :], mask=m_c[:, None] & m_c[None, :], other=0.0)
    penalty = _penalty(p_gram, C, ridge, BLOCK_C)
    scaling = _ratio(1.0, tl.load(p_gram + c * (C + 1), mask=m_c, other=0.0) + penalty)[:, None]
    p_right += pair * C * D_V
    residual = tl.load(p_right + c[:, None] * D_V + d[None, :], mask=m_c[:, None] & (d < D_V)[None, :], other=0.0)
    scaled = residual * scaling
    direction, change = scaled, tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    size = tl.sum(residual * scaled, 0)
    for _ in range(steps):
        product = tl.dot(gram, direction, input_precision="tf32x3") + penalty * direction
        length = _ratio(size, tl.sum(direction * product, 0))[None, :]
        change += length * direction
        residual -= length * product
        scaled = residual * scaling
        smaller = tl.sum(residual * scaled, 0)
        direction = scaled + _ratio(smaller, size)[None, :] * direction
        size = smaller
    p_v = p_values + batch * stride_vb + kv_head * stride_vh + tl.cast(d, tl.int64)[None, :] * stride_vd
    if p_unchanged is not None:
        p_unchanged += pair
    _store_refitted(p_v, p_kept + pair * C, p_unchanged, p_refitted + pair * C * D_V, change, c, d, C, stride_vt, D_V)


@triton.jit
def _solve_in_blocks_kernel(
    p_gram,
    p_residual,
    p_direction,
    p_product,
    p_change,
    p_values,
    p_kept,
    p_unchanged,
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
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Conjugate gradients for BLOCK_D features of any number of kept tokens; at first `p_residual` is the right side.

    A barrier stands wherever threads read what others wrote.
    """
    pair = tl.cast(tl.program_id(1), tl.int64)
    batch, kv_head = pair // H_KV, pair % H_KV
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    block, k_block = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    p_gram += pair * C * C
    penalty = _penalty(p_gram, C, ridge, BLOCK_C)
    o_pair = pair * C * D_V + d[None, :]
    size = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = tl.cast(start + block, tl.int64)
        offset, mask = o_pair + c[:, None] * D_V, (c < C)[:, None] & (d < D_V)[None, :]
        residual = tl.load(p_residual + offset, mask=mask, other=0.0)
        scaled = residual * _ratio(1.0, tl.load(p_gram + c * (C + 1), mask=c < C, other=0.0) + penalty)[:, None]
        tl.store(p_direction + offset, scaled, mask=mask)
        tl.store(p_change + offset, tl.zeros_like(scaled), mask=mask)
        size += tl.sum(residual * scaled, 0)
    tl.debug_barrier()
    for _ in range(steps):
        curvature = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = tl.cast(start + block, tl.int64)
            offset, mask = o_pair + c[:, None] * D_V, (c < C)[:, None] & (d < D_V)[None, :]
            product = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
            for other in range(0, C, BLOCK_K):
                k = tl.cast(other + k_block, tl.int64)
                p_tile = p_gram + c[:, None] * C + k[None, :]
                gram = tl.load(p_tile, mask=(c < C)[:, None] & (k < C)[None, :], other=0.0)
                p_part = p_direction + o_pair + k[:, None] * D_V
                part = tl.load(p_part, mask=(k < C)[:, None] & (d < D_V)[None, :], other=0.0)
                product = tl.dot(gram, part, product, input_precision="tf32x3")
            direction = tl.load(p_direction + offset, mask=mask, other=0.0)
            product += penalty * direction
            tl.store(p_product + offset, product, mask=mask)
            curvature += tl.sum(direction * product, 0)
        length = _ratio(size, curvature)[None, :]
        tl.debug_barrier()
        smaller = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = tl.cast(start + block, tl.int64)
            offset, mask = o_pair + c[:, None] * D_V, (c < C)[:, None] & (d < D_V)[None, :]
            direction = tl.load(p_direction + offset, mask=mask, other=0.0)
            change = tl.load(p_change + offset, mask=mask, other=0.0) + length * direction
            residual = tl.load(p_residual + offset, mask=mask, other=0.0)
            residual -= length * tl.load(p_product + offset, mask=mask, other=0.0)
            scaled = residual * _ratio(1.0, tl.load(p_gram + c * (C + 1), mask=c < C, other=0.0) + penalty)[:, None]
            tl.store(p_change + offset, change, mask=mask)
            tl.store(p_residual + offset, residual, mask=mask)
            tl.store(p_product + offset, scaled, mask=mask)
            smaller += tl.sum(residual * scaled, 0)
        turn = _ratio(smaller, size)[None, :]
        size = smaller
        tl.debug_barrier()
        for start in range(0, C, BLOCK_C):
            c = tl.cast(start + block, tl.int64)
            offset, mask = o_pair + c[:, None] * D_V, (c < C)[:, None] & (d < D_V)[None, :]
            scaled = tl.load(p_product + offset, mask=mask, other=0.0)
            direction = scaled + turn * tl.load(p_direction + offset, mask=mask, other=0.0)
            tl.store(p_direction + offset, direction, mask=mask)
        tl.debug_barrier()
    p_v = p_values + batch * stride_vb + kv_head * stride_vh + tl.cast(d, tl.int64)[None, :] * stride_vd
    if p_unchanged is not None:
        p_unchanged += pair
    for start in range(0, C, BLOCK_C):
        c = start + block
        offset, mask = o_pair + tl.cast(c, tl.int64)[:, None] * D_V, (c < C)[:, None] & (d < D_V)[None, :]
        change = tl.load(p_change + offset, mask=mask, other=0.0)
        _store_refitted(
            p_v, p_kept + pair * C, p_unchanged, p_refitted + pair * C * D_V, change, c, d, C, stride_vt, D_V
        )


def solve(
    gram: torch.Tensor,
    right: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    unchanged: torch.Tensor | None,
    ridge: float,
    steps: int,
) -> torch.Tensor:
    """The kept values with their changes.

    Args:
        gram: (pairs, C, C) float32, products of the attention to the kept tokens with itself.
        right: (pairs, C, D_v) float32, products of that attention with what is missing; it is written over.
        values: (B, H_kv, T, D_v).
        kept: (B, H_kv, C) int64, contiguous.
        unchanged: (B, H_kv) uint8, 1 for KV heads that keep their values; None: none does.
        ridge, steps: as for `reference.refit_values`.

    Returns:
        (B, H_kv, C, D_v) of the dtype of the values.
    """
    pairs, count, value_dim = right.shape
    refitted = values.new_empty((*kept.shape, value_dim))
    grid = divided_up(value_dim, _FEATURES), pairs
    arguments = values, kept, unchanged, refitted, count, values.shape[1], float(ridge), steps, *values.stride()
    if count <= MOST_ON_CHIP:
        block = max(next_power_of_2(count), 16)
        launch(
            _solve_kernel,
            grid,
            gram,
            right,
            *arguments,
            D_V=value_dim,
            BLOCK_C=block,
            BLOCK_D=_FEATURES,
            num_warps=max(block // 16, 4),
        )
        return refitted
    work = right.new_empty((3, *right.shape))
    launch(
        _solve_in_blocks_kernel,
        grid,
        gram,
        right,
        *work,
        *arguments,
        D_V=value_dim,
        BLOCK_C=_ROWS_AT_ONCE,
        BLOCK_K=_KEPT_AT_ONCE,
        BLOCK_D=_FEATURES,
        num_warps=8,
    )
    return refitted
