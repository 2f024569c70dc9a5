"""The first pass over a prompt's keys: the log-sum-exp of every query row.  Exponentials are in base 2.

A launch goes over parts of the tokens; where there are several, a small one combines what they came to.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..launching import launch
from ..sizes import divided_up, next_power_of_2
from .logits import logit_scales, soft_capped
from .products import tile_products
from .tiles import Tiles, split

# Stands for the largest of no logits at all; finite, so that differences with it are numbers.
LOWEST = tl.constexpr(-1.0e38)
# What is larger, or no number, comes of keys or queries that are not finite.
LARGEST_LOGIT = tl.constexpr(1.0e37)
_COMBINED_ROWS = 256
# The fewest columns that a tile product can have.
LEAST_COLUMNS = tl.constexpr(16)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_sinks(p_sinks, head, mask):
    """The learned sinks of query heads, in base 2."""
    return tl.cast(tl.load(p_sinks + head, mask=mask, other=0.0), tl.float32) * LOG2_E


@triton.jit
def start_softmax(sinks, BLOCK: tl.constexpr):
    """Largest logit and sum of a softmax before any token: of learned sinks in base 2, None if there are none."""
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if sinks is not None:
        largest = tl.maximum(largest, sinks)
        total += tl.exp2(sinks - largest)
    return largest, total


@triton.jit
def _with_sinks(shifts, sinks):
    """Minus log-sum-exps with learned sinks among their terms; a row that attends to no token stays without one."""
    largest = tl.maximum(-shifts, sinks)
    with_sinks = -largest - tl.log2(tl.exp2(-shifts - largest) + tl.exp2(sinks - largest))
    return tl.where(shifts < -LOWEST, with_sinks, shifts)


@triton.jit
def _accumulate(logits, scale, largest, total):
    """One step of a running log-sum-exp over the columns of (rows, columns) logits."""
    larger = tl.maximum(largest, tl.max(logits, 1) * scale)
    weights = tl.exp2(tl.fma(logits, scale, -larger[:, None]))
    return larger, total * tl.exp2(largest - larger) + tl.sum(weights, 1)


@triton.jit
def _log_sum(
    b_q, p_q, m_rows, p_k, p_valid, begin, end, scale, cap_scale, stride_kt, stride_kd,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, FINITE: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of a block of query rows over some tokens; unless FINITE, others are looked for."""
    t = tl.arange(0, BLOCK_T)
    whole = begin + (end - begin) // BLOCK_T * BLOCK_T
    largest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(begin, whole, BLOCK_T):
        p_tile = p_k + tl.cast(start, tl.int64) * stride_kt
        logits = soft_capped(tile_products(b_q, p_q, m_rows, 1, p_tile, None, stride_kd, D), cap_scale)
        if p_valid is not None:
            m_t = tl.load(p_valid + start + t) != 0
            logits = tl.where(m_t[None, :], logits, float("-inf"))
        if not FINITE:
            logits = tl.where(tl.abs(logits) < LARGEST_LOGIT, logits, float("-inf"))
        largest, total = _accumulate(logits, scale, largest, total)
    if whole < end:
        m_t = whole + t < end
        p_tile = p_k + tl.cast(whole, tl.int64) * stride_kt
        logits = soft_capped(tile_products(b_q, p_q, m_rows, 1, p_tile, m_t, stride_kd, D), cap_scale)
        if p_valid is not None:
            m_t &= tl.load(p_valid + whole + t, mask=m_t, other=0) != 0
        logits = tl.where(m_t[None, :], logits, float("-inf"))
        if not FINITE:
            logits = tl.where(tl.abs(logits) < LARGEST_LOGIT, logits, float("-inf"))
        largest, total = _accumulate(logits, scale, largest, total)
    return largest, total


@triton.jit(do_not_specialize=["T", "tiles_per_part", "stride_vb"])
def _log_sum_kernel(
    p_proxies,
    p_last,
    p_keys,
    p_valid,
    p_sinks,
    p_shifts,
    N,
    T,
    H_KV,
    tiles_per_part,
    scale,
    cap_scale,
    stride_pb,
    stride_ph,
    stride_pn,
    stride_lb,
    stride_lh,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Minus the log-sum-exp of a block of query rows over a part of the tokens.

    A block has proxies of one query head or, the last blocks of a KV head, the last queries of its R query heads.
    `p_sinks` is None where there are none, or several parts: then they are added with the parts.
    """
    block, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, kv_head = tl.cast(pair // H_KV, tl.int64), tl.cast(pair % H_KV, tl.int64)
    blocks_per_head = tl.cdiv(N, BLOCK_Q)
    is_last = block >= R * blocks_per_head
    head = tl.where(is_last, 0, block // blocks_per_head)
    rows = (block - tl.where(is_last, R, head) * blocks_per_head) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_rows = rows < tl.where(is_last, R, N)
    t = tl.arange(0, BLOCK_T)

    query_head = kv_head * R + head
    p_q = tl.where(
        is_last,
        p_last + batch * stride_lb + query_head * stride_lh,
        p_proxies + batch * stride_pb + query_head * stride_ph,
    )
    p_q += tl.cast(rows, tl.int64)[:, None] * tl.where(is_last, stride_lh, stride_pn)
    b_q = None
    if not EXACT:
        d = tl.arange(0, BLOCK_D)
        b_q = tl.load(p_q + d[None, :], mask=m_rows[:, None] & (d < D)[None, :], other=0.0)
    p_k = p_keys + batch * stride_kb + kv_head * stride_kh + tl.cast(t, tl.int64)[None, :] * stride_kt
    if p_valid is not None:
        p_valid += batch * stride_vb
    begin = part * tiles_per_part * BLOCK_T
    end = tl.minimum(begin + tiles_per_part * BLOCK_T, T)
    largest, total = _log_sum(
        b_q, p_q, m_rows, p_k, p_valid, begin, end, scale, cap_scale, stride_kt, stride_kd, D, BLOCK_Q, BLOCK_T, True
    )
    # To look at every logit takes a fifth of the time: only where a key or query turns out not to be finite.
    if tl.max(tl.where(total < float("inf"), 0, 1), 0) > 0:
        largest, total = _log_sum(
            b_q, p_q, m_rows, p_k, p_valid, begin, end, scale, cap_scale, stride_kt, stride_kd, D, BLOCK_Q, BLOCK_T,
            False,
        )  # fmt: skip
    # Shifts of a part: (B, H, N) of the proxies, then (B, H) of the last queries.
    heads = tl.cast(tl.num_programs(2), tl.int64) * R
    first_head = tl.cast(pair, tl.int64) * R
    first_row = tl.where(is_last, heads * N + first_head, (first_head + head) * N)
    p_out = p_shifts + part * heads * (N + 1) + first_row + rows
    shifts = -largest - tl.log2(total)
    if p_sinks is not None:
        shifts = _with_sinks(shifts, load_sinks(p_sinks, kv_head * R + tl.where(is_last, rows, head), m_rows))
    tl.store(p_out, shifts, mask=m_rows)


@triton.jit
def last_weights(
    b_k, p_k, m_t, stride_kd, p_last, p_shifts, first, scale, cap_scale, stride_lh, R: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Weights (tokens, LEAST_COLUMNS) of a KV head's last queries, from `first` on; 0 for one that has no log-sum."""
    h = first + tl.arange(0, LEAST_COLUMNS)
    m_h = h < R
    p_q = p_last + tl.cast(h, tl.int64)[None, :] * stride_lh
    logits = soft_capped(tile_products(b_k, p_k, m_t, stride_kd, p_q, m_h, 1, D), cap_scale)
    shifts = tl.load(p_shifts + h, mask=m_h, other=float("-inf"))
    weights = tl.exp2(tl.fma(logits, scale, shifts[None, :]))
    return tl.where(shifts[None, :] < -LOWEST, weights, 0.0)


@triton.jit(do_not_specialize=["parts"])
def _combine_kernel(p_parts, p_sinks, p_shifts, rows, N, H, parts, BLOCK: tl.constexpr):
    """The shifts over all tokens, from those over parts of them; without sinks N and H are None."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_row = row < rows
    smallest = tl.full([BLOCK], -LOWEST, tl.float32)
    for part in range(parts):
        smallest = tl.minimum(smallest, tl.load(p_parts + part * rows + row, mask=m_row, other=0.0))
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.exp2(smallest - tl.load(p_parts + part * rows + row, mask=m_row, other=0.0))
    p_out = p_shifts + row
    shifts = smallest - tl.log2(total)
    if p_sinks is not None:
        proxies = rows // (N + 1) * N
        head = tl.where(row < proxies, row // N, row - proxies) % H
        shifts = _with_sinks(shifts, load_sinks(p_sinks, head, m_row))
    tl.store(p_out, shifts, mask=m_row)


class Problem(NamedTuple):
    """The tensors of one call, and what all of its launches are given."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
    sinks: torch.Tensor | None
    strides: tuple[int, ...]
    constants: dict[str, Any]
    scales: tuple[float, float | None]
    pairs: int  # KV heads of all rows of the batch


def problem_of(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> Problem:
    """What the launches of both passes share."""
    heads, head_dim = proxy_queries.shape[1], proxy_queries.shape[3]
    batch, kv_heads, tokens, _ = keys.shape
    if proxy_queries.stride(-1) != 1:
        proxy_queries = proxy_queries.contiguous()
    if last_query.stride(-1) != 1:
        last_query = last_query.contiguous()
    return Problem(
        (proxy_queries, last_query, keys, None if valid is None else valid.contiguous().view(torch.uint8)),
        None if sinks is None else sinks.contiguous(),
        (*proxy_queries.stride()[:3], *last_query.stride()[:2], *keys.stride(), tokens),
        {
            "R": heads // kv_heads,
            "D": head_dim,
            "BLOCK_D": max(next_power_of_2(head_dim), 16),
            "EXACT": keys.dtype == torch.float32,
        },
        logit_scales(scaling, softcap),
        batch * kv_heads,
    )


def log_sums(problem: Problem, tiles: Tiles, others: tuple[Tiles, ...], multiprocessors: int) -> torch.Tensor:
    """Minus the log-sum-exp of every row: (B, H, N) of the proxies, then (B, H) of the last queries, flat.

    Args:
        problem: the tensors.
        tiles: for this prompt.
        others: for prompts of other lengths.
        multiprocessors: of the GPU.
    """

    def constants_of(tiles: Tiles) -> dict[str, Any]:
        return {**problem.constants, **launch_options(tiles, "BLOCK_Q", "BLOCK_T")}

    proxies, _, keys, _ = problem.tensors
    batch, heads, count, _ = proxies.shape
    kv_heads, tokens = keys.shape[1:3]
    per_head = heads // kv_heads
    blocks = per_head * divided_up(count, tiles.kept) + divided_up(per_head, tiles.kept)
    parts, tiles_per_part = split(blocks * problem.pairs, divided_up(tokens, tiles.streamed), multiprocessors)
    rows = batch * heads * (count + 1)
    shifts = keys.new_empty((parts, rows), dtype=torch.float32)
    launch(
        _log_sum_kernel,
        (blocks, parts, problem.pairs),
        *problem.tensors,
        problem.sinks if parts == 1 else None,
        shifts,
        count,
        tokens,
        kv_heads,
        tiles_per_part,
        *problem.scales,
        *problem.strides,
        others=lambda: map(constants_of, others),
        **constants_of(tiles),
    )
    if parts == 1:
        return shifts
    combined = keys.new_empty(rows, dtype=torch.float32)
    sizes = (None, None) if problem.sinks is None else (count, heads)
    launch(
        _combine_kernel,
        (divided_up(rows, _COMBINED_ROWS),),
        shifts,
        problem.sinks,
        combined,
        rows,
        *sizes,
        parts,
        BLOCK=_COMBINED_ROWS,
    )
    return combined


def launch_options(tiles: Tiles, kept: str, streamed: str) -> dict[str, Any]:
    """Keywords of a launch; `kept` and `streamed` are what the kernel calls its tiles."""
    return {
        kept: tiles.kept,
        streamed: tiles.streamed,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "maxnreg": tiles.registers,
    }
