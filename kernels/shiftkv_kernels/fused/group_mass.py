"""The attention mass of each group of proxies on every token, without ever holding the proxies' attention (step 4).

For a tile of tokens, the normalised weights of all proxies are summed over each group as they are made.  Both passes
over the keys make the logits anew, in tiles that never leave the chip.  Exponentials are in base 2.
"""

import torch
import triton
import triton.language as tl

from ..device import gpu_of
from ..launching import launch
from ..sizes import divided_up, next_power_of_2
from .log_sums import LEAST_COLUMNS, Problem, last_weights, launch_options, log_sums, problem_of
from .logits import soft_capped
from .products import tile_products
from .tiles import Tiles, choose_tiles, split, tiles_of_all_lengths

# The fewest columns that a group is given in a tile.
_LEAST_SPAN = 8


@triton.jit
def _mean_last_mass(
    b_k, p_k, m_t, stride_kd, p_last, p_shifts, scale, cap_scale, stride_lh, R: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Mean weight that a KV head's last queries put on each of a tile of tokens."""
    total = tl.zeros([p_k.shape[0]], tl.float32)
    for first in tl.static_range(0, R, LEAST_COLUMNS):
        weights = last_weights(b_k, p_k, m_t, stride_kd, p_last, p_shifts, first, scale, cap_scale, stride_lh, R, D)
        total += tl.sum(weights, 1)
    return total * (1.0 / R)


@triton.jit
def _weights_by_group(
    logits, scale, cap_scale, shifts, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr
):
    """Weights of (BLOCK_T, GROUPS * SPAN) products, summed over each group as far as a thread can: (.., GROUPS, 4).

    A thread holds two neighbouring columns of every eight, so two of the five dimensions are its own.
    """
    weights = tl.exp2(tl.fma(soft_capped(logits, cap_scale), scale, shifts[None, :]))
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
    last_mass = _mean_last_mass(b_k, p_k, m_t, stride_kd, p_last, p_last_shifts, scale, cap_scale, stride_lh, R, D)
    if share == 0:
        p_out = p_last_mass + tl.cast(pair, tl.int64) * T + t
        # No mass, but still no number where a key is not finite.
        tl.store(p_out, tl.where(m_counted, last_mass, 0.0 * last_mass), mask=m_t)
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
        sums += _weights_by_group(logits, scale, cap_scale, shifts, BLOCK_T, GROUPS, SPAN)
        if i % TILES == TILES - 1:
            g = chunk * GROUPS + tl.arange(0, GROUPS)
            mass = tl.fma(tl.sum(sums, 2), 1.0 / (R * (GROUP_SIZE + 1)), last_mass[:, None])
            p_out = p_mass + (tl.cast(pair, tl.int64) * G + g)[None, :] * T + t[:, None]
            # A key that is not finite gets no mass, and makes none: see `log_sums`.
            is_mass = m_counted[:, None] & (mass >= 0.0)
            tl.store(p_out, tl.where(is_mass, mass, 0.0), mask=m_t[:, None] & (g < G)[None, :])
            sums = tl.zeros([BLOCK_T, GROUPS, 4], tl.float32)


def group_mass(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    *,
    num_groups: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.group_mass`, on a GPU: float32, bfloat16 or float16, head dims up to 256, positive scaling.

    Products are made in the inputs' dtype and summed in float32; what follows is float32.

    Args:
        tiles: of the two passes, to measure others than the built-in ones.
    """
    problem = problem_of(proxy_queries, last_query, keys, scaling, softcap, sinks, valid)
    gpu = gpu_of(keys.device)
    size = problem.constants["BLOCK_D"], keys.element_size()
    first, second = tiles or choose_tiles(*size, keys.shape[2], gpu)
    with torch.cuda.device_of(keys):
        shifts = log_sums(problem, first, tiles_of_all_lengths(choose_tiles, *size, gpu)[0], gpu.multiprocessors)
        return _masses(problem, second, shifts, num_groups, gpu.multiprocessors)


def _masses(
    problem: Problem, tiles: Tiles, shifts: torch.Tensor, num_groups: int, multiprocessors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    proxies, _, keys, _ = problem.tensors
    count = proxies.shape[2]
    batch, kv_heads, tokens, _ = keys.shape
    group_size = count // num_groups
    span = min(max(next_power_of_2(group_size), _LEAST_SPAN), tiles.streamed)
    tiles = tiles._replace(streamed=min(tiles.streamed, max(next_power_of_2(num_groups) * span, 16)))
    groups_per_tile = tiles.streamed // span
    blocks = divided_up(tokens, tiles.kept)
    shares, chunks_per_program = split(blocks * problem.pairs, divided_up(num_groups, groups_per_tile), multiprocessors)
    mass = keys.new_empty((batch, kv_heads, num_groups, tokens), dtype=torch.float32)
    last_mass = keys.new_empty((batch, kv_heads, tokens), dtype=torch.float32)
    launch(
        _group_mass_kernel,
        (blocks, shares, problem.pairs),
        *problem.tensors,
        shifts,
        mass,
        last_mass,
        count,
        tokens,
        num_groups,
        kv_heads,
        chunks_per_program,
        *problem.scales,
        *problem.strides,
        **problem.constants,
        GROUP_SIZE=group_size,
        SPAN=span,
        EVEN=group_size % span == 0 and num_groups % groups_per_tile == 0,
        **launch_options(tiles, "BLOCK_T", "BLOCK_Q"),
    )
    return mass, last_mass
