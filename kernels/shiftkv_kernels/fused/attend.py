"""What queries behind a prompt get from it, in one pass over its keys and values (method, step 9).

A launch goes over parts of the tokens; where there are several, a small one combines them.  Exponentials are in base 2.
"""

import torch
import triton
import triton.language as tl

from ..device import gpu_of
from ..launching import launch
from ..sizes import divided_up, next_power_of_2
from .finite import finite, load_rows
from .log_sums import LARGEST_LOGIT, LOWEST, launch_options, load_sinks, start_softmax
from .logits import logit_scales, soft_capped
from .products import tile_products, whole_features
from .tiles import Tiles, choose_attend_tiles, split

_COMBINED_ROWS = 16


@triton.jit
def _add_tile(
    b_q, p_q, m_rows, p_k, p_v, p_valid, start, end, m_t, largest, total, outputs, scale, cap_scale,
    stride_kt, stride_kd, stride_vt, stride_vd, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D_V: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_T: tl.constexpr, FINITE: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax, over a tile of tokens; `m_t` is None for a whole tile."""
    t = tl.arange(0, BLOCK_T)
    p_tile = p_k + tl.cast(start, tl.int64) * stride_kt + tl.cast(t, tl.int64)[None, :] * stride_kt
    logits = soft_capped(tile_products(b_q, p_q, m_rows, 1, p_tile, m_t, stride_kd, D), cap_scale)
    if p_valid is not None:
        is_valid = tl.load(p_valid + start + t, mask=start + t < end, other=0) != 0
        logits = tl.where(is_valid[None, :], logits, float("-inf"))
    if m_t is not None:
        logits = tl.where(m_t[None, :], logits, float("-inf"))
    if not FINITE:
        logits = tl.where(tl.abs(logits) < LARGEST_LOGIT, logits, float("-inf"))
    larger = tl.maximum(largest, tl.max(logits, 1) * scale)
    weights = tl.exp2(tl.fma(logits, scale, -larger[:, None]))
    rescale = tl.exp2(largest - larger)
    total = total * rescale + tl.sum(weights, 1)
    b_v = load_rows(p_v + tl.cast(start, tl.int64) * stride_vt, t, m_t, stride_vt, stride_vd, D_V, BLOCK_D_V)
    if not FINITE:
        b_v = finite(b_v)
    outputs *= rescale[:, None]
    outputs = tl.dot(tl.cast(weights, b_v.dtype), b_v, outputs, input_precision="ieee" if EXACT else None)
    return larger, total, outputs


@triton.jit
def _attend_to(
    b_q, p_q, m_rows, p_k, p_v, p_valid, sinks, begin, end, scale, cap_scale, stride_kt, stride_kd, stride_vt,
    stride_vd, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D_V: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, FINITE: tl.constexpr,
):  # fmt: skip
    """Softmax state of a block of queries over some tokens; unless FINITE, numbers that are not are looked for."""
    largest, total = start_softmax(sinks, BLOCK_Q)
    outputs = tl.zeros([BLOCK_Q, BLOCK_D_V], tl.float32)
    whole = begin + (end - begin) // BLOCK_T * BLOCK_T
    for start in range(begin, whole, BLOCK_T):
        largest, total, outputs = _add_tile(
            b_q, p_q, m_rows, p_k, p_v, p_valid, start, end, None, largest, total, outputs, scale, cap_scale,
            stride_kt, stride_kd, stride_vt, stride_vd, D, D_V, BLOCK_D_V, EXACT, BLOCK_T, FINITE,
        )  # fmt: skip
    if whole < end:
        m_t = whole + tl.arange(0, BLOCK_T) < end
        largest, total, outputs = _add_tile(
            b_q, p_q, m_rows, p_k, p_v, p_valid, whole, end, m_t, largest, total, outputs, scale, cap_scale,
            stride_kt, stride_kd, stride_vt, stride_vd, D, D_V, BLOCK_D_V, EXACT, BLOCK_T, FINITE,
        )  # fmt: skip
    return largest, total, outputs


@triton.jit(do_not_specialize=["T", "tiles_per_part", "stride_mb"])
def _attend_kernel(
    p_queries,
    p_keys,
    p_values,
    p_valid,
    p_sinks,
    p_outputs,
    p_sums,
    N,
    T,
    H_KV,
    tiles_per_part,
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
    p_q = p_queries + batch * stride_qb + (kv_head * R + head) * stride_qh
    p_q += tl.cast(rows, tl.int64)[:, None] * stride_qn
    b_q = None
    if not EXACT:
        d = tl.arange(0, BLOCK_D)
        b_q = tl.load(p_q + d[None, :], mask=m_rows[:, None] & (d < D)[None, :], other=0.0)
    p_k = p_keys + batch * stride_kb + kv_head * stride_kh
    p_v = p_values + batch * stride_vb + kv_head * stride_vh
    if p_valid is not None:
        p_valid += batch * stride_mb
    sinks = None
    if p_sinks is not None:
        # Once, with the first part.
        sinks = tl.where(part == 0, load_sinks(p_sinks, kv_head * R + head, True), float("-inf"))
    begin = part * tiles_per_part * BLOCK_T
    end = tl.minimum(begin + tiles_per_part * BLOCK_T, T)
    largest, total, outputs = _attend_to(
        b_q, p_q, m_rows, p_k, p_v, p_valid, sinks, begin, end, scale, cap_scale, stride_kt, stride_kd, stride_vt,
        stride_vd, D, D_V, BLOCK_D_V, EXACT, BLOCK_Q, BLOCK_T, True,
    )  # fmt: skip
    # To look at every number takes its time: only where one turns out not to be finite.
    is_broken = (total < float("inf")) == 0
    is_broken |= (tl.max(tl.abs(outputs), 1) < float("inf")) == 0
    is_broken |= (tl.sum(outputs, 1) == tl.sum(outputs, 1)) == 0
    if tl.max(tl.where(is_broken, 1, 0), 0) > 0:
        largest, total, outputs = _attend_to(
            b_q, p_q, m_rows, p_k, p_v, p_valid, sinks, begin, end, scale, cap_scale, stride_kt, stride_kd, stride_vt,
            stride_vd, D, D_V, BLOCK_D_V, EXACT, BLOCK_Q, BLOCK_T, False,
        )  # fmt: skip
    outputs /= tl.where(total > 0, total, 1.0)[:, None]
    first_row = (tl.cast(part, tl.int64) * tl.num_programs(2) + pair) * R * N + tl.cast(head, tl.int64) * N
    d_v = tl.arange(0, BLOCK_D_V)
    p_out = p_outputs + (first_row + rows)[:, None] * D_V + d_v[None, :]
    tl.store(p_out, outputs, mask=m_rows[:, None] & (d_v < D_V)[None, :])
    tl.store(p_sums + first_row + rows, largest + tl.log2(total), mask=m_rows)


@triton.jit(do_not_specialize=["parts"])
def _combine_kernel(
    p_parts, p_sums, p_outputs, rows, parts, D_V: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK: tl.constexpr
):
    """The outputs over all tokens, from those over parts of them."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D_V)
    m_row = row < rows
    mask = m_row[:, None] & (d < D_V)[None, :]
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    for part in range(parts):
        largest = tl.maximum(largest, tl.load(p_sums + part * rows + row, mask=m_row, other=0.0))
    total = tl.zeros([BLOCK], tl.float32)
    outputs = tl.zeros([BLOCK, BLOCK_D_V], tl.float32)
    for part in range(parts):
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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """As `reference.attend`, on a GPU: float32, bfloat16 or float16, head dims up to 256, positive scaling.

    Args:
        tiles: to measure others than the built-in ones.
    """
    queries, keys = whole_features(queries), whole_features(keys)
    batch, heads, count, head_dim = queries.shape
    kv_heads, tokens, value_dim = values.shape[1:]
    if queries.stride(-1) != 1:
        queries = queries.contiguous()
    per_head, pairs, rows = heads // kv_heads, batch * kv_heads, batch * heads * count
    blocks_d = [max(next_power_of_2(size), 16) for size in (head_dim, value_dim)]
    gpu = gpu_of(keys.device)
    tiles = tiles or choose_attend_tiles(max(blocks_d), keys.element_size(), gpu)
    blocks = per_head * divided_up(count, tiles.kept)
    parts, tiles_per_part = split(blocks * pairs, divided_up(tokens, tiles.streamed), gpu.multiprocessors)
    by_part = keys.new_empty((parts, batch, heads, count, value_dim), dtype=torch.float32)
    sums = keys.new_empty((parts, rows), dtype=torch.float32)
    with torch.cuda.device_of(keys):
        launch(
            _attend_kernel,
            (blocks, parts, pairs),
            queries,
            keys,
            values,
            None if valid is None else valid.contiguous().view(torch.uint8),
            None if sinks is None else sinks.contiguous(),
            by_part,
            sums,
            count,
            tokens,
            kv_heads,
            tiles_per_part,
            *logit_scales(scaling, softcap),
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
            **launch_options(tiles, "BLOCK_Q", "BLOCK_T"),
        )
        return by_part[0] if parts == 1 else _combined(by_part, sums, blocks_d[1])


def _combined(by_part: torch.Tensor, sums: torch.Tensor, block_d: int) -> torch.Tensor:
    """Outputs (B, H, n, D_v) of those of each part, (parts, B, H, n, D_v), and their sums, (parts, B * H * n)."""
    parts, rows = sums.shape
    outputs = by_part.new_empty(by_part.shape[1:])
    launch(
        _combine_kernel,
        (divided_up(rows, _COMBINED_ROWS),),
        by_part,
        sums,
        outputs,
        rows,
        parts,
        D_V=by_part.shape[-1],
        BLOCK_D_V=block_d,
        BLOCK=_COMBINED_ROWS,
    )
    return outputs
