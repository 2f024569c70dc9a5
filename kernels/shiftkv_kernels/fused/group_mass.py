"""The attention mass of each group of proxies on every token, without ever holding the proxies' attention (step 4).

Two launches go over the keys, with a small one between them where one pass needs more programs than there are rows:

1. the log-sum-exp of every query row, over parts of the tokens, which are then combined;
2. for a tile of tokens, the normalised weights of all proxies, summed over each group as they are made.

Both make the logits anew, in tiles that never leave the chip.  Exponentials are in base 2.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..device import gpu_of
from .products import tile_products
from .tiles import Tiles, choose_tiles, split

# Stands for the largest of no logits at all; finite, so that differences with it are numbers.
_LOWEST = tl.constexpr(-1.0e38)
# The fewest columns that a tile product can have, and that a group is given in a tile.
_LEAST_COLUMNS = tl.constexpr(16)
_LEAST_SPAN = 8
_COMBINED_ROWS = 256


@triton.jit
def _accumulate(logits, scale, largest, total):
    """One step of a running log-sum-exp over the columns of (rows, columns) logits."""
    larger = tl.maximum(largest, tl.max(logits, 1) * scale)
    weights = tl.exp2(tl.fma(logits, scale, -larger[:, None]))
    return larger, total * tl.exp2(largest - larger) + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["T", "tiles_per_part", "stride_vb"])
def _log_sum_kernel(
    p_proxies,
    p_last,
    p_keys,
    p_valid,
    p_shifts,
    N,
    T,
    H_KV,
    tiles_per_part,
    scale,
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
    whole = begin + (end - begin) // BLOCK_T * BLOCK_T
    largest = tl.full([BLOCK_Q], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(begin, whole, BLOCK_T):
        p_tile = p_k + tl.cast(start, tl.int64) * stride_kt
        logits = tile_products(b_q, p_q, m_rows, 1, p_tile, None, stride_kd, D)
        if p_valid is not None:
            m_t = tl.load(p_valid + start + t) != 0
            logits = tl.where(m_t[None, :], logits, float("-inf"))
        largest, total = _accumulate(logits, scale, largest, total)
    if whole < end:
        m_t = whole + t < end
        p_tile = p_k + tl.cast(whole, tl.int64) * stride_kt
        logits = tile_products(b_q, p_q, m_rows, 1, p_tile, m_t, stride_kd, D)
        if p_valid is not None:
            m_t &= tl.load(p_valid + whole + t, mask=m_t, other=0) != 0
        logits = tl.where(m_t[None, :], logits, float("-inf"))
        largest, total = _accumulate(logits, scale, largest, total)
    # Shifts of a part: (B, H, N) of the proxies, then (B, H) of the last queries.
    heads = tl.cast(tl.num_programs(2), tl.int64) * R
    first_head = tl.cast(pair, tl.int64) * R
    first_row = tl.where(is_last, heads * N + first_head, (first_head + head) * N)
    tl.store(p_shifts + part * heads * (N + 1) + first_row + rows, -largest - tl.log2(total), mask=m_rows)


@triton.jit
def _combine_kernel(p_parts, p_shifts, rows, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The shifts over all tokens, from those over parts of them."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_row = row < rows
    smallest = tl.full([BLOCK], -_LOWEST, tl.float32)
    for part in tl.static_range(PARTS):
        smallest = tl.minimum(smallest, tl.load(p_parts + part * rows + row, mask=m_row, other=0.0))
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.exp2(smallest - tl.load(p_parts + part * rows + row, mask=m_row, other=0.0))
    tl.store(p_shifts + row, smallest - tl.log2(total), mask=m_row)


@triton.jit
def _mean_last_mass(b_k, p_k, m_t, stride_kd, p_last, p_shifts, scale, stride_lh, R: tl.constexpr, D: tl.constexpr):
    """Mean weight that a KV head's last queries put on each of a tile of tokens."""
    h = tl.arange(0, _LEAST_COLUMNS)
    total = tl.zeros([p_k.shape[0]], tl.float32)
    for first in tl.static_range(0, R, _LEAST_COLUMNS):
        m_h = first + h < R
        p_q = p_last + tl.cast(first + h, tl.int64)[None, :] * stride_lh
        logits = tile_products(b_k, p_k, m_t, stride_kd, p_q, m_h, 1, D)
        shifts = tl.load(p_shifts + first + h, mask=m_h, other=float("-inf"))
        total += tl.sum(tl.exp2(tl.fma(logits, scale, shifts[None, :])), 1)
    return total * (1.0 / R)


@triton.jit
def _weights_by_group(logits, scale, shifts, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """Weights of (BLOCK_T, GROUPS * SPAN) logits, summed over each group as far as a thread can: (.., GROUPS, 4).

    A thread holds two neighbouring columns of every eight, so two of the five dimensions are its own.
    """
    weights = tl.exp2(tl.fma(logits, scale, shifts[None, :]))
    weights = tl.reshape(weights, [BLOCK_T, GROUPS, SPAN // 8, 4, 2])
    return tl.sum(tl.sum(weights, 4), 2)


@triton.jit(do_not_specialize=["T", "chunks_per_program", "stride_vb"])
def _group_mass_kernel(
    p_proxies,
    p_last,
    p_keys,
    p_valid,
    p_shifts,
    p_mass,
    p_last_mass,
    N,
    T,
    G,
    H_KV,
    chunks_per_program,
    scale,
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
    GROUP_SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    EVEN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Mass of some groups on a tile of tokens, for one KV head.

    A tile of BLOCK_Q proxies of a query head is a chunk of BLOCK_Q // SPAN groups or, when they are large, a part of
    one group.  The tiles of a chunk, for all R query heads, follow one another.
    """
    GROUPS: tl.constexpr = BLOCK_Q // SPAN
    TILES: tl.constexpr = R * ((GROUP_SIZE + SPAN - 1) // SPAN)
    tile, share, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, kv_head = tl.cast(pair // H_KV, tl.int64), tl.cast(pair % H_KV, tl.int64)
    t, q = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_Q)
    m_t = t < T
    p_proxies += batch * stride_pb + kv_head * R * stride_ph
    p_last += batch * stride_lb + kv_head * R * stride_lh
    p_k = p_keys + batch * stride_kb + kv_head * stride_kh + tl.cast(t, tl.int64)[:, None] * stride_kt
    b_k = None
    if not EXACT:
        d = tl.arange(0, BLOCK_D)
        b_k = tl.load(p_k + d[None, :] * stride_kd, mask=m_t[:, None] & (d < D)[None, :], other=0.0)
    # The last token is kept whatever its mass.
    m_counted = t < T - 1
    if p_valid is not None:
        m_counted &= tl.load(p_valid + batch * stride_vb + t, mask=m_t, other=0) != 0
    first_head, heads = tl.cast(pair, tl.int64) * R, tl.cast(tl.num_programs(2), tl.int64) * R
    p_last_shifts = p_shifts + heads * N + first_head
    p_shifts += first_head * N
    last_mass = _mean_last_mass(b_k, p_k, m_t, stride_kd, p_last, p_last_shifts, scale, stride_lh, R, D)
    if share == 0:
        p_out = p_last_mass + tl.cast(pair, tl.int64) * T + t
        tl.store(p_out, tl.where(m_counted, last_mass, 0.0), mask=m_t)
    last_mass *= 1.0 / (GROUP_SIZE + 1)

    # Group and member that a tile's columns belong to, relative to the first.
    group, member = q // SPAN, q % SPAN
    within = group * GROUP_SIZE + member
    p_q = p_proxies + tl.cast(within, tl.int64)[None, :] * stride_pn
    first_chunk = share * chunks_per_program
    chunks = tl.minimum(tl.cdiv(G, GROUPS) - first_chunk, chunks_per_program)
    sums = tl.zeros([BLOCK_T, GROUPS, 4], tl.float32)
    for i in range(0, chunks * TILES):
        chunk = first_chunk + i // TILES
        head, passed = i % TILES % R, i % TILES // R * SPAN
        first = chunk * GROUPS * GROUP_SIZE + passed
        p_tile = p_q + tl.cast(head, tl.int64) * stride_ph + tl.cast(first, tl.int64) * stride_pn
        p_tile_shifts = p_shifts + head * N + first + within
        if EVEN:
            shifts = tl.load(p_tile_shifts)
            logits = tile_products(b_k, p_k, m_t, stride_kd, p_tile, None, 1, D)
        else:
            m_q = (chunk * GROUPS + group < G) & (passed + member < GROUP_SIZE)
            shifts = tl.load(p_tile_shifts, mask=m_q, other=float("-inf"))
            logits = tile_products(b_k, p_k, m_t, stride_kd, p_tile, m_q, 1, D)
        sums += _weights_by_group(logits, scale, shifts, BLOCK_T, GROUPS, SPAN)
        if i % TILES == TILES - 1:
            g = chunk * GROUPS + tl.arange(0, GROUPS)
            mass = tl.fma(tl.sum(sums, 2), 1.0 / (R * (GROUP_SIZE + 1)), last_mass[:, None])
            p_out = p_mass + (tl.cast(pair, tl.int64) * G + g)[None, :] * T + t[:, None]
            tl.store(p_out, tl.where(m_counted[:, None], mass, 0.0), mask=m_t[:, None] & (g < G)[None, :])
            sums = tl.zeros([BLOCK_T, GROUPS, 4], tl.float32)


class _Problem(NamedTuple):
    """The tensors of one call, and what all of its launches are given."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
    strides: tuple[int, ...]
    constants: dict[str, Any]
    scale: float
    pairs: int  # KV heads of all rows of the batch


def group_mass(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    *,
    num_groups: int,
    scaling: float,
    valid: torch.Tensor | None = None,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.group_mass`, on a GPU: float32, bfloat16 or float16, head dims up to 256, positive scaling.

    Products are made in the inputs' dtype and summed in float32; what follows is float32.

    Args:
        tiles: of the two passes, to measure others than the built-in ones.
    """
    heads, head_dim = proxy_queries.shape[1], proxy_queries.shape[3]
    batch, kv_heads, tokens, _ = keys.shape
    if proxy_queries.stride(-1) != 1:
        proxy_queries = proxy_queries.contiguous()
    if last_query.stride(-1) != 1:
        last_query = last_query.contiguous()
    problem = _Problem(
        (proxy_queries, last_query, keys, None if valid is None else valid.contiguous().view(torch.uint8)),
        (*proxy_queries.stride()[:3], *last_query.stride()[:2], *keys.stride(), tokens),
        {
            "R": heads // kv_heads,
            "D": head_dim,
            "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
            "EXACT": keys.dtype == torch.float32,
        },
        scaling / math.log(2),
        batch * kv_heads,
    )
    gpu = gpu_of(keys.device)
    first, second = tiles or choose_tiles(problem.constants["BLOCK_D"], keys.element_size(), gpu)
    with torch.cuda.device_of(keys):
        shifts = _log_sums(problem, first, gpu.multiprocessors)
        return _masses(problem, second, shifts, num_groups, gpu.multiprocessors)


def _log_sums(problem: _Problem, tiles: Tiles, multiprocessors: int) -> torch.Tensor:
    """Minus the log-sum-exp of every row: (B, H, N) of the proxies, then (B, H) of the last queries, flat."""
    proxies, _, keys, _ = problem.tensors
    batch, heads, count, _ = proxies.shape
    kv_heads, tokens = keys.shape[1:3]
    per_head = heads // kv_heads
    blocks = per_head * triton.cdiv(count, tiles.kept) + triton.cdiv(per_head, tiles.kept)
    parts, tiles_per_part = split(blocks * problem.pairs, triton.cdiv(tokens, tiles.streamed), multiprocessors)
    rows = batch * heads * (count + 1)
    shifts = keys.new_empty((parts, rows), dtype=torch.float32)
    _log_sum_kernel[blocks, parts, problem.pairs](
        *problem.tensors,
        shifts,
        count,
        tokens,
        kv_heads,
        tiles_per_part,
        problem.scale,
        *problem.strides,
        **problem.constants,
        **_options(tiles, "BLOCK_Q", "BLOCK_T"),
    )
    if parts == 1:
        return shifts
    combined = keys.new_empty(rows, dtype=torch.float32)
    _combine_kernel[(triton.cdiv(rows, _COMBINED_ROWS),)](shifts, combined, rows, PARTS=parts, BLOCK=_COMBINED_ROWS)
    return combined


def _masses(
    problem: _Problem, tiles: Tiles, shifts: torch.Tensor, num_groups: int, multiprocessors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    proxies, _, keys, _ = problem.tensors
    count = proxies.shape[2]
    batch, kv_heads, tokens, _ = keys.shape
    group_size = count // num_groups
    span = min(max(triton.next_power_of_2(group_size), _LEAST_SPAN), tiles.streamed)
    tiles = tiles._replace(streamed=min(tiles.streamed, max(triton.next_power_of_2(num_groups) * span, 16)))
    groups_per_tile = tiles.streamed // span
    blocks = triton.cdiv(tokens, tiles.kept)
    shares, chunks_per_program = split(
        blocks * problem.pairs, triton.cdiv(num_groups, groups_per_tile), multiprocessors
    )
    mass = keys.new_empty((batch, kv_heads, num_groups, tokens), dtype=torch.float32)
    last_mass = keys.new_empty((batch, kv_heads, tokens), dtype=torch.float32)
    _group_mass_kernel[blocks, shares, problem.pairs](
        *problem.tensors,
        shifts,
        mass,
        last_mass,
        count,
        tokens,
        num_groups,
        kv_heads,
        chunks_per_program,
        problem.scale,
        *problem.strides,
        **problem.constants,
        GROUP_SIZE=group_size,
        SPAN=span,
        EVEN=group_size % span == 0 and num_groups % groups_per_tile == 0,
        **_options(tiles, "BLOCK_T", "BLOCK_Q"),
    )
    return mass, last_mass


def _options(tiles: Tiles, kept: str, streamed: str) -> dict[str, Any]:
    """Keywords of a launch; `kept` and `streamed` are what the kernel calls its tiles."""
    return {
        kept: tiles.kept,
        streamed: tiles.streamed,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "maxnreg": tiles.registers,
    }
