"""The votes of the groups (step 5), without sorting their masses."""

import torch
import triton
import triton.language as tl

from ..launching import launch
from ..sizes import divided_up, next_power_of_2
from .search import ROW_OPTIONS, find_cut, load_ranks, row_options

_TOKENS_PER_PROGRAM = 128
_GROUPS_AT_ONCE = 32


@triton.jit(do_not_specialize=["T"])
def _cut_kernel(p_mass, p_cuts, T, threshold, remainder, BLOCK: tl.constexpr, RESIDENT: tl.constexpr):
    """The lowest mass, as a rank, that a group votes for, and the last token with just that mass that it votes for."""
    row = tl.cast(tl.program_id(0), tl.int64)
    p_row = p_mass + row * T
    ranks, weights = load_ranks(p_row, None, 0, T, BLOCK, False)
    if RESIDENT:
        total = tl.sum(weights, 0)
    else:
        for start in range(BLOCK, T, BLOCK):
            _, piece = load_ranks(p_row, None, start, T, BLOCK, False)
            weights += piece
        total = tl.sum(weights, 0)
    # Tokens below the cut share the remainder of the mass, so the cut is above their mean if all tokens are below;
    # half of it leaves room for rounding.  No token has more than the total.
    low = tl.cast(0.5 * remainder * total / T, tl.int32, bitcast=True) - 1
    high = tl.cast(total, tl.int32, bitcast=True)
    rank, index = find_cut(ranks, weights, p_row, None, T, threshold * total, low, high, BLOCK, False, RESIDENT)
    # Without any mass there is no vote.
    tl.store(p_cuts + 2 * row, tl.where(total > 0.0, rank, 0x7FFFFFFF))
    tl.store(p_cuts + 2 * row + 1, index)


@triton.jit(do_not_specialize=["T"])
def _count_kernel(p_mass, p_cuts, p_last_mass, p_votes, G, T, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr):
    """How many groups vote for each of a tile of tokens."""
    pair = tl.cast(tl.program_id(1), tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = t < T
    votes = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, G, BLOCK_G):
        group = first + tl.arange(0, BLOCK_G)
        m_group = group < G
        row = pair * G + group
        p_tile = p_mass + row[:, None] * T + t[None, :]
        # (BLOCK_G, BLOCK_T)
        mass = tl.load(p_tile, mask=m_group[:, None] & m_t[None, :], other=0.0)
        ranks = tl.cast(mass, tl.int32, bitcast=True)
        cut_rank = tl.load(p_cuts + 2 * row, mask=m_group, other=0x7FFFFFFF)
        cut_index = tl.load(p_cuts + 2 * row + 1, mask=m_group, other=-1)
        is_tie = (ranks == cut_rank[:, None]) & (t[None, :] <= cut_index[:, None])
        votes += tl.sum(tl.where((ranks > cut_rank[:, None]) | is_tie, 1.0, 0.0), 0)
    if p_last_mass is not None:
        votes += tl.load(p_last_mass + pair * T + t, mask=m_t, other=0.0)
    tl.store(p_votes + pair * T + t, votes, mask=m_t)


def vote(mass: torch.Tensor, threshold: float, last_mass: torch.Tensor | None = None) -> torch.Tensor:
    """As `reference.vote`, on a GPU.

    Sums of a group's masses are rounded in another order there than here, so where a group's share is reached to
    within rounding at one token or the next, it may cast a vote more or less.
    """
    batch, kv_heads, groups, tokens = mass.shape
    mass = mass.contiguous()
    pairs = batch * kv_heads
    cuts = mass.new_empty((pairs * groups, 2), dtype=torch.int32)
    votes = mass.new_empty((batch, kv_heads, tokens))
    with torch.cuda.device_of(mass):
        launch(
            _cut_kernel,
            (pairs * groups,),
            mass,
            cuts,
            tokens,
            float(threshold),
            float(1 - threshold),
            others=lambda: ROW_OPTIONS,
            **row_options(tokens),
        )
        block_groups = min(next_power_of_2(groups), _GROUPS_AT_ONCE)
        launch(
            _count_kernel,
            (divided_up(tokens, _TOKENS_PER_PROGRAM), pairs),
            mass,
            cuts,
            None if last_mass is None else last_mass.contiguous(),
            votes,
            groups,
            tokens,
            BLOCK_G=block_groups,
            BLOCK_T=_TOKENS_PER_PROGRAM,
        )
    return votes
