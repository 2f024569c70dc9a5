"""What each token gives to the output of proxies and last query (method, steps 7 and 8), without their attention.

After the log-sums of all query rows (log_sums.py):

1. for a tile of tokens, the weights of all proxies and of the last queries, summed with their squares as they are made;
2. the mean output, over parts of the tokens;
3. for a tile of tokens, the distance of the values from it, and the scores.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..device import gpu_of
from ..launching import launch
from ..reference.values import LARGEST_MEAN as _LARGEST_MEAN
from ..reference.values import SINK_MASS as _SINK_MASS
from ..reference.values import SINK_SCORE as _SINK_SCORE
from ..sizes import divided_up, next_power_of_2
from .finite import finite, load_finite, load_rows
from .log_sums import LEAST_COLUMNS, Problem, last_weights, launch_options, log_sums, problem_of
from .logits import soft_capped
from .products import tile_products
from .tiles import Tiles, choose_value_tiles, split, tiles_of_all_lengths

LARGEST_MEAN = tl.constexpr(_LARGEST_MEAN)
SINK_MASS, SINK_SCORE = tl.constexpr(_SINK_MASS), tl.constexpr(_SINK_SCORE)
_TOKENS_AT_ONCE = 64
PARTS_AT_ONCE = tl.constexpr(16)
_MOST_PARTS = 128
_TILES_PER_PROGRAM = 4  # of the scores, at most: each program needs the whole mean output
_PROGRAMS = 512  # as many as these are no fewer for it


@triton.jit
def _sums_of(weights, BLOCK_T: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over the columns of (BLOCK_T, COLUMNS) weights as far as a thread can make them: (BLOCK_T, 4).

    A thread holds two neighbouring columns of every eight.
    """
    weights = tl.reshape(weights, [BLOCK_T, COLUMNS // 8, 4, 2])
    return tl.sum(tl.sum(weights, 3), 1)


@triton.jit(do_not_specialize=["T", "steps_per_program", "stride_vb"])
def _moments_kernel(
    p_proxies,
    p_last,
    p_keys,
    p_valid,
    p_shifts,
    p_moments,
    p_last_moments,
    N,
    T,
    H_KV,
    steps_per_program,
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
    EVEN: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sums of weights and of their squares over a share of the proxies, and means over the last queries."""
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
    m_counted = m_t
    if p_valid is not None:
        m_counted &= tl.load(p_valid + batch * stride_vb + t, mask=m_t, other=0) != 0
    pairs = tl.cast(tl.num_programs(2), tl.int64)
    first_head = tl.cast(pair, tl.int64) * R
    row = tl.cast(pair, tl.int64) * T + t
    if share == 0:
        p_last_shifts = p_shifts + pairs * R * N + first_head
        mean = tl.zeros([BLOCK_T], tl.float32)
        square = tl.zeros([BLOCK_T], tl.float32)
        for first in tl.static_range(0, R, LEAST_COLUMNS):
            weights = last_weights(
                b_k, p_k, m_t, stride_kd, p_last, p_last_shifts, first, scale, cap_scale, stride_lh, R, D
            )
            mean += tl.sum(weights, 1)
            square += tl.sum(weights * weights, 1)
        tl.store(p_last_moments + row, tl.where(m_counted, mean * (1.0 / R), 0.0), mask=m_t)
        tl.store(p_last_moments + pairs * T + row, tl.where(m_counted, square * (1.0 / R), 0.0), mask=m_t)

    blocks = tl.cdiv(N, BLOCK_Q)
    first_step = share * steps_per_program
    last_step = tl.minimum(first_step + steps_per_program, blocks * R)
    p_q = p_proxies + tl.cast(q, tl.int64)[None, :] * stride_pn
    sums = tl.zeros([BLOCK_T, 4], tl.float32)
    squares = tl.zeros([BLOCK_T, 4], tl.float32)
    for step in range(first_step, last_step):
        head, first = step % R, step // R * BLOCK_Q
        p_tile = p_q + tl.cast(head, tl.int64) * stride_ph + tl.cast(first, tl.int64) * stride_pn
        p_tile_shifts = p_shifts + (first_head + head) * N + first + q
        if EVEN:
            shifts = tl.load(p_tile_shifts)
            logits = tile_products(b_k, p_k, m_t, stride_kd, p_tile, None, 1, D)
        else:
            m_q = first + q < N
            shifts = tl.load(p_tile_shifts, mask=m_q, other=float("-inf"))
            logits = tile_products(b_k, p_k, m_t, stride_kd, p_tile, m_q, 1, D)
        weights = tl.exp2(tl.fma(soft_capped(logits, cap_scale), scale, shifts[None, :]))
        sums += _sums_of(weights, BLOCK_T, BLOCK_Q)
        squares += _sums_of(weights * weights, BLOCK_T, BLOCK_Q)
    p_out = p_moments + tl.cast(share, tl.int64) * 2 * pairs * T + row
    tl.store(p_out, tl.where(m_counted, tl.sum(sums, 1), 0.0), mask=m_t)
    tl.store(p_out + pairs * T, tl.where(m_counted, tl.sum(squares, 1), 0.0), mask=m_t)


@triton.jit
def _total(p_shares, m_t, stride, shares):
    """The sum of a moment over the shares."""
    total = tl.load(p_shares, mask=m_t, other=0.0)
    for share in range(1, shares):
        total += tl.load(p_shares + share * stride, mask=m_t, other=0.0)
    return total


@triton.jit(do_not_specialize=["T", "tiles_per_part", "shares"])
def _mean_output_kernel(
    p_moments,
    p_values,
    p_outputs,
    p_has_sink,
    T,
    H_KV,
    tiles_per_part,
    shares,
    per_row,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    D_V: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """What a part of the tokens gives to the proxies' mean output; nothing is known of sinks yet."""
    part, pair = tl.program_id(0), tl.program_id(1)
    if p_has_sink is not None:
        tl.store(p_has_sink + pair, tl.cast(0, tl.uint8), mask=part == 0)
    batch, kv_head = tl.cast(pair // H_KV, tl.int64), tl.cast(pair % H_KV, tl.int64)
    stride = 2 * tl.cast(tl.num_programs(1), tl.int64) * T
    p_moments += tl.cast(pair, tl.int64) * T
    p_values += batch * stride_vb + kv_head * stride_vh
    output = tl.zeros([BLOCK_D_V], tl.float32)
    for tile in range(part * tiles_per_part, (part + 1) * tiles_per_part):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = t < T
        mass = finite(_total(p_moments + t, m_t, stride, shares))
        values = load_finite(p_values, t, m_t, stride_vt, stride_vd, D_V, BLOCK_D_V)
        output += tl.sum(mass[:, None] * tl.cast(values, tl.float32), 0)
    row = tl.cast(pair, tl.int64) * tl.num_programs(0) + part
    tl.store(p_outputs + row * BLOCK_D_V + tl.arange(0, BLOCK_D_V), output * per_row)


@triton.jit
def _per_remaining(mean, square):
    return tl.sqrt(square) / (1.0 - tl.minimum(mean, LARGEST_MEAN))


@triton.jit(do_not_specialize=["T", "shares", "parts", "tiles", "stride_mb"])
def _scores_kernel(
    p_moments,
    p_last_moments,
    p_outputs,
    p_values,
    p_valid,
    p_scores,
    p_has_sink,
    T,
    H_KV,
    shares,
    parts,
    tiles,
    per_row,
    last_weight,
    stride_mb,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    D_V: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The scores of some tiles of tokens."""
    pair = tl.program_id(1)
    batch, kv_head = tl.cast(pair // H_KV, tl.int64), tl.cast(pair % H_KV, tl.int64)
    pairs = tl.cast(tl.num_programs(1), tl.int64)
    part, d = tl.arange(0, PARTS_AT_ONCE), tl.arange(0, BLOCK_D_V)
    p_parts = p_outputs + (tl.cast(pair, tl.int64) * parts + part)[:, None] * BLOCK_D_V + d[None, :]
    sums = tl.zeros([PARTS_AT_ONCE, BLOCK_D_V], tl.float32)
    for start in range(0, parts, PARTS_AT_ONCE):
        sums += tl.load(p_parts + start * BLOCK_D_V, mask=(start + part < parts)[:, None], other=0.0)
    output = tl.sum(sums, 0)
    p_values += batch * stride_vb + kv_head * stride_vh
    stride = 2 * pairs * T
    first = tl.program_id(0) * tiles * BLOCK_T
    for start in range(first, tl.minimum(first + tiles * BLOCK_T, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        m_t = t < T
        row = tl.cast(pair, tl.int64) * T + t
        values = tl.cast(load_rows(p_values, t, m_t, stride_vt, stride_vd, D_V, BLOCK_D_V), tl.float32)
        offsets = tl.where((d < D_V)[None, :], values - output[None, :], 0.0)
        distance = tl.sqrt(tl.sum(offsets * offsets, 1))
        mean = _total(p_moments + row, m_t, stride, shares) * per_row
        square = _total(p_moments + pairs * T + row, m_t, stride, shares) * per_row
        last_mean = tl.load(p_last_moments + row, mask=m_t, other=0.0)
        last_square = tl.load(p_last_moments + pairs * T + row, mask=m_t, other=0.0)
        scores = (_per_remaining(mean, square) + last_weight * _per_remaining(last_mean, last_square)) * distance
        with_sinks = tl.where(mean > SINK_MASS, SINK_SCORE * (1.0 + mean), scores)
        # A key or value that is not finite leaves no finite score.
        scores = tl.where(scores < float("inf"), with_sinks, float("nan"))
        if p_valid is not None:
            is_valid = tl.load(p_valid + batch * stride_mb + t, mask=m_t, other=0) != 0
            scores = tl.where(is_valid, scores, 0.0)
        tl.store(p_scores + row, scores, mask=m_t)
        if p_has_sink is not None:
            # All programs that store anything store the same.
            sinks = tl.sum(tl.where(m_t & (scores >= SINK_SCORE), 1, 0), 0)
            tl.store(p_has_sink + pair, tl.cast(1, tl.uint8), mask=sinks > 0)


def value_scores(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    last_weight: float = 1.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    has_sink: torch.Tensor | None = None,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> torch.Tensor:
    """As `reference.value_scores`, on a GPU: float32, bfloat16 or float16, head dims up to 256, positive scaling.

    Products are made in the inputs' dtype and summed in float32; what follows is float32.

    Args:
        tiles: of the two passes over the keys, to measure others than the built-in ones.
    """
    problem = problem_of(proxy_queries, last_query, keys, scaling, softcap, sinks, valid)
    gpu = gpu_of(keys.device)
    size = problem.constants["BLOCK_D"], keys.element_size()
    first, second = tiles or choose_value_tiles(*size, keys.shape[2], gpu)
    all_first, all_second = tiles_of_all_lengths(choose_value_tiles, *size, gpu)
    with torch.cuda.device_of(keys):
        shifts = log_sums(problem, first, all_first, gpu.multiprocessors)
        moments, last_moments = _moments(problem, second, all_second, shifts, gpu.multiprocessors)
        flags = None if has_sink is None else has_sink.view(torch.uint8)
        return _scores(problem, values, moments, last_moments, last_weight, flags)


def _moments(
    problem: Problem, tiles: Tiles, others: tuple[Tiles, ...], shifts: torch.Tensor, multiprocessors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(shares, 2, B, H_kv, T): sums of weights and of their squares; (2, B, H_kv, T): means for the last queries."""
    proxies, _, keys, _ = problem.tensors
    count = proxies.shape[2]
    batch, kv_heads, tokens, _ = keys.shape
    most = max(next_power_of_2(count), 16)

    def constants_of(tiles: Tiles) -> dict[str, Any]:
        tiles = tiles._replace(streamed=min(tiles.streamed, most))
        is_even = count % tiles.streamed == 0
        return {**problem.constants, "EVEN": is_even, **launch_options(tiles, "BLOCK_T", "BLOCK_Q")}

    tiles = tiles._replace(streamed=min(tiles.streamed, most))
    blocks, steps = divided_up(tokens, tiles.kept), divided_up(count, tiles.streamed) * problem.constants["R"]
    shares, steps_per_program = split(blocks * problem.pairs, steps, multiprocessors)
    moments = keys.new_empty((shares, 2, batch, kv_heads, tokens), dtype=torch.float32)
    last_moments = keys.new_empty((2, batch, kv_heads, tokens), dtype=torch.float32)
    launch(
        _moments_kernel,
        (blocks, shares, problem.pairs),
        *problem.tensors,
        shifts,
        moments,
        last_moments,
        count,
        tokens,
        kv_heads,
        steps_per_program,
        *problem.scales,
        *problem.strides,
        others=lambda: map(constants_of, others),
        **constants_of(tiles),
    )
    return moments, last_moments


def _scores(
    problem: Problem,
    values: torch.Tensor,
    moments: torch.Tensor,
    last_moments: torch.Tensor,
    last_weight: float,
    has_sink: torch.Tensor | None,
) -> torch.Tensor:
    proxies, _, _, valid = problem.tensors
    batch, kv_heads, tokens, value_dim = values.shape
    per_row = 1.0 / (problem.constants["R"] * proxies.shape[2])
    block = next_power_of_2(value_dim)
    tiles = divided_up(tokens, _TOKENS_AT_ONCE)
    tiles_per_part = divided_up(tiles, min(tiles, _MOST_PARTS))
    parts = divided_up(tiles, tiles_per_part)
    outputs = values.new_empty((problem.pairs, parts, block), dtype=torch.float32)
    constants: dict[str, Any] = {"D_V": value_dim, "BLOCK_D_V": block, "BLOCK_T": _TOKENS_AT_ONCE}
    launch(
        _mean_output_kernel,
        (parts, problem.pairs),
        moments,
        values,
        outputs,
        has_sink,
        tokens,
        kv_heads,
        tiles_per_part,
        moments.shape[0],
        per_row,
        *values.stride(),
        **constants,
    )
    scores = values.new_empty((batch, kv_heads, tokens), dtype=torch.float32)
    together = _TILES_PER_PROGRAM if tiles * problem.pairs >= _TILES_PER_PROGRAM * _PROGRAMS else 1
    launch(
        _scores_kernel,
        (divided_up(tiles, together), problem.pairs),
        moments,
        last_moments,
        outputs,
        values,
        valid,
        scores,
        has_sink,
        tokens,
        kv_heads,
        moments.shape[0],
        parts,
        together,
        per_row,
        float(last_weight),
        tokens,
        *values.stride(),
        **constants,
    )
    return scores
