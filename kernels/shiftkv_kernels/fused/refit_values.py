"""Values refitted to the tokens that are kept (method, step 9), without waiting for the device.

1. The queries' attention to the kept tokens, and what these do not give them of their outputs.
2. The products of that attention with itself and with what is missing.
3. Conjugate gradients (solve.py).
"""

import torch
import triton
import triton.language as tl

from ..launching import launch
from ..reference.values import LEAST_ATTENTION as _LEAST_ATTENTION
from ..sizes import divided_up, next_power_of_2
from .finite import load_finite, load_rows
from .log_sums import LARGEST_LOGIT, load_sinks, start_softmax
from .logits import logit_scales, soft_capped
from .products import tile_products, whole_features
from .solve import MOST_ON_CHIP, solve

LEAST_ATTENTION = tl.constexpr(_LEAST_ATTENTION)
_ROWS, _KEPT = 64, 64  # queries and kept tokens of a tile of attention
_FEW_PRODUCTS, _MANY_PRODUCTS = 32, 64  # rows and columns of a tile of products, where few or many tokens are kept


@triton.jit
def _logits_of_kept(
    b_q, p_q, m_rows, p_k, p_kept, p_valid, c, C, stride_kt, stride_kd, scale, cap_scale, D: tl.constexpr
):  # fmt: skip
    """Logits in base 2 of queries and the kept tokens c, -inf where there is none, padding or no finite key."""
    m_c = c < C
    token = tl.load(p_kept + c, mask=m_c, other=0)
    products = tile_products(b_q, p_q, m_rows, 1, p_k + token[None, :] * stride_kt, m_c, stride_kd, D)
    logits = soft_capped(products, cap_scale)
    if p_valid is not None:
        m_c &= tl.load(p_valid + token, mask=m_c, other=0) != 0
    return tl.where(m_c[None, :] & (tl.abs(logits) < LARGEST_LOGIT), logits * scale, float("-inf"))


@triton.jit
def _log_sum(logits, largest, total):
    """One step of a running log-sum-exp over the columns of logits in base 2."""
    larger = tl.maximum(largest, tl.max(logits, 1))
    return larger, total * tl.exp2(largest - larger) + tl.sum(tl.exp2(logits - larger[:, None]), 1)


@triton.jit
def _shift(largest, total):
    return tl.where(total > 0, largest + tl.log2(total), 0.0)


@triton.jit
def _give(
    logits, shift, given, p_attention, p_kept, p_v, c, m_rows, C, stride_vt, stride_vd,
    D_V: tl.constexpr, BLOCK_D_V: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stores the attention to the kept tokens c, and adds what they give."""
    weights = tl.maximum(tl.exp2(logits - shift[:, None]), LEAST_ATTENTION)
    weights = tl.where(logits > float("-inf"), weights, 0.0)
    tl.store(p_attention + c[None, :], weights, mask=m_rows[:, None] & (c < C)[None, :])
    token = tl.load(p_kept + c, mask=c < C, other=0)
    b_v = tl.cast(load_finite(p_v, token, c < C, stride_vt, stride_vd, D_V, BLOCK_D_V), tl.float32)
    return tl.dot(weights, b_v, given, input_precision="ieee" if EXACT else "tf32x3")


@triton.jit(do_not_specialize=["stride_mb"])
def _missing_kernel(
    p_queries,
    p_outputs,
    p_keys,
    p_values,
    p_valid,
    p_sinks,
    p_kept,
    p_attention,
    p_missing,
    N,
    C,
    H_KV,
    scale,
    cap_scale,
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
    FITS: tl.constexpr,
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
    given = tl.zeros([BLOCK_Q, BLOCK_D_V], tl.float32)
    p_attention += (pair * R * N + row)[:, None] * C
    block = tl.arange(0, BLOCK_C)
    sinks = None
    if p_sinks is not None:
        sinks = load_sinks(p_sinks, kv_head * R + row // N, m_rows)
    largest, total = start_softmax(sinks, BLOCK_Q)
    if FITS:
        logits = _logits_of_kept(
            b_q, p_q, m_rows, p_k, p_kept, p_valid, block, C, stride_kt, stride_kd, scale, cap_scale, D
        )
        largest, total = _log_sum(logits, largest, total)
        given = _give(
            logits, _shift(largest, total), given, p_attention, p_kept, p_v, block, m_rows, C, stride_vt, stride_vd,
            D_V, BLOCK_D_V, EXACT,
        )  # fmt: skip
    else:
        for start in range(0, C, BLOCK_C):
            c = start + block
            logits = _logits_of_kept(
                b_q, p_q, m_rows, p_k, p_kept, p_valid, c, C, stride_kt, stride_kd, scale, cap_scale, D
            )
            largest, total = _log_sum(logits, largest, total)
        shift = _shift(largest, total)
        for start in range(0, C, BLOCK_C):
            c = start + block
            logits = _logits_of_kept(
                b_q, p_q, m_rows, p_k, p_kept, p_valid, c, C, stride_kt, stride_kd, scale, cap_scale, D
            )
            given = _give(
                logits, shift, given, p_attention, p_kept, p_v, c, m_rows, C, stride_vt, stride_vd, D_V, BLOCK_D_V,
                EXACT,
            )  # fmt: skip
    outputs = load_rows(p_outputs + pair * R * N * D_V, row, m_rows, D_V, 1, D_V, BLOCK_D_V)
    d_v = tl.arange(0, BLOCK_D_V)
    p_out = p_missing + (pair * R * N + row)[:, None] * D_V + d_v[None, :]
    tl.store(p_out, outputs - given, mask=m_rows[:, None] & (d_v < D_V)[None, :])


@triton.jit
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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    unchanged: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.refit_values`, on a GPU: float32, bfloat16 or float16, head dims up to 256, positive scaling."""
    queries, keys = whole_features(queries), whole_features(keys)
    if queries.stride(-1) != 1:
        queries = queries.contiguous()
    kept = kept.contiguous()
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    with torch.cuda.device_of(keys):
        outputs, scales = outputs.contiguous(), logit_scales(scaling, softcap)
        sinks = None if sinks is None else sinks.contiguous()
        attention, missing = _missing(queries, outputs, keys, values, kept, scales, sinks, valid)
        flags = None if unchanged is None else unchanged.view(torch.uint8)
        return solve(*_products(attention, missing), values, kept, flags, ridge, steps)


def _missing(
    queries: torch.Tensor,
    outputs: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    scales: tuple[float, float | None],
    sinks: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (pairs, rows, C) and what is missing (pairs, rows, D_v), float32; a KV head's rows are neighbours."""
    batch, heads, count, head_dim = queries.shape
    kv_heads, tokens, value_dim = values.shape[1:]
    pairs, rows = batch * kv_heads, heads // kv_heads * count
    attention = keys.new_empty((pairs, rows, kept.shape[2]), dtype=torch.float32)
    missing = keys.new_empty((pairs, rows, value_dim), dtype=torch.float32)
    block_d, block_d_v = (max(next_power_of_2(size), 16) for size in (head_dim, value_dim))
    is_wide = max(block_d, block_d_v) > 128
    block_c = _KEPT // 2 if is_wide else _KEPT
    launch(
        _missing_kernel,
        (divided_up(rows, _ROWS), pairs),
        queries,
        outputs,
        keys,
        values,
        valid,
        sinks,
        kept,
        attention,
        missing,
        count,
        kept.shape[2],
        kv_heads,
        *scales,
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
        FITS=kept.shape[2] <= block_c,
        BLOCK_Q=_ROWS,
        BLOCK_C=block_c,
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
    block = _FEW_PRODUCTS if count <= MOST_ON_CHIP else _MANY_PRODUCTS
    left_tiles, value_tiles = divided_up(count, block), divided_up(value_dim, block)
    launch(
        _products_kernel,
        (left_tiles, left_tiles + value_tiles, pairs),
        attention,
        missing,
        gram,
        right,
        rows,
        count,
        D_V=value_dim,
        BLOCK_R=_ROWS,
        BLOCK=block,
        num_warps=4,
    )
    return gram, right
