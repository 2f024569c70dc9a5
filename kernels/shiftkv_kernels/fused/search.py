"""What `vote` and `keep_best` share: the rank down to which the largest entries of a row have to be taken.

A rank is an integer that orders like the entry: floats that are not negative order like their bits.  The rank is found
by narrowing an interval to a quarter at a time.  A row that fits stays in registers meanwhile; a longer one is read
anew each time.
"""

import triton
import triton.language as tl

# Few, so that few kernels serve prompts of all lengths.  The longest rows that stay in registers take 32 of them in
# each of 1,024 threads.
ROW_OPTIONS: tuple[dict[str, int | bool], ...] = (
    {"BLOCK": 4096, "RESIDENT": True, "num_warps": 8},
    {"BLOCK": 16384, "RESIDENT": True, "num_warps": 32},
    {"BLOCK": 32768, "RESIDENT": True, "num_warps": 32},
    {"BLOCK": 8192, "RESIDENT": False, "num_warps": 32},
)


def row_options(tokens: int) -> dict[str, int | bool]:
    """Keywords of a launch that has one program per row of so many tokens, out of `ROW_OPTIONS`."""
    return next((each for each in ROW_OPTIONS if each["RESIDENT"] and tokens <= each["BLOCK"]), ROW_OPTIONS[-1])


@triton.jit
def load_ranks(p_row, p_valid, start, T, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Ranks of BLOCK entries from `start` on, and what each weighs: its value, or 1 if they are to be counted.

    Where they are counted, the last entry is left out (rank -1), padding ranks below all else, in its own order, and
    entries that are not finite rank below the others.
    """
    t = start + tl.arange(0, BLOCK)
    if COUNT:
        m_t = t < T - 1
        entries = tl.load(p_row + t, mask=m_t, other=0.0) + 0.0
        ranks = tl.where(entries < float("inf"), tl.cast(entries, tl.int32, bitcast=True) + 1, 0)
        if p_valid is not None:
            is_valid = tl.load(p_valid + t, mask=m_t, other=0) != 0
            ranks = tl.where(is_valid, ranks + T, t)
        ranks = tl.where(m_t, ranks, -1)
        weights = tl.full([BLOCK], 1.0, tl.float32)
    else:
        weights = tl.load(p_row + t, mask=t < T, other=0.0)
        ranks = tl.cast(weights, tl.int32, bitcast=True)
    return ranks, weights


@triton.jit
def _sums_above(
    ranks, weights, p_row, p_valid, T, first, second, third,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """The sums of the weights whose ranks are above each of three pivots."""
    if RESIDENT:
        above_first = tl.where(ranks > first, weights, 0.0)
        above_second = tl.where(ranks > second, weights, 0.0)
        above_third = tl.where(ranks > third, weights, 0.0)
    else:
        above_first = tl.zeros([BLOCK], tl.float32)
        above_second = tl.zeros([BLOCK], tl.float32)
        above_third = tl.zeros([BLOCK], tl.float32)
        for start in range(0, T, BLOCK):
            piece_ranks, piece_weights = load_ranks(p_row, p_valid, start, T, BLOCK, COUNT)
            above_first += tl.where(piece_ranks > first, piece_weights, 0.0)
            above_second += tl.where(piece_ranks > second, piece_weights, 0.0)
            above_third += tl.where(piece_ranks > third, piece_weights, 0.0)
    return tl.sum(above_first, 0), tl.sum(above_second, 0), tl.sum(above_third, 0)


@triton.jit
def _ties_until(
    ranks, p_row, p_valid, T, rank, index,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """How many entries up to and including that at `index` have the rank."""
    t = tl.arange(0, BLOCK)
    if RESIDENT:
        ties = tl.where((ranks == rank) & (t <= index), 1.0, 0.0)
    else:
        ties = tl.zeros([BLOCK], tl.float32)
        for start in range(0, T, BLOCK):
            piece_ranks, _ = load_ranks(p_row, p_valid, start, T, BLOCK, COUNT)
            ties += tl.where((piece_ranks == rank) & (start + t <= index), 1.0, 0.0)
    return tl.sum(ties, 0)


@triton.jit
def find_cut(
    ranks, weights, p_row, p_valid, T, target, low, high,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """The fewest entries that weigh `target` together, highest ranks and then earliest indices first.

    If RESIDENT, `ranks` and `weights` are the whole row.  The lowest rank among those entries must be more than `low`
    and at most `high`.

    Returns:
        A rank and an index: the entries of a higher rank, and those of the same rank up to that index.
    """
    # Counts are exact, so that the search can end as soon as a pivot has just the right number of entries above it.
    above_low = -1.0
    while (high - low > 1) & (above_low != target):
        second = low + (high - low) // 2
        first = low + (second - low) // 2
        third = second + (high - second) // 2
        above_first, above_second, above_third = _sums_above(
            ranks, weights, p_row, p_valid, T, first, second, third, BLOCK, COUNT, RESIDENT
        )
        # The sums fall as the pivots rise: go on between the last pivot that reaches the target and the next one.
        high = tl.where(above_third < target, third, high)
        high = tl.where(above_second < target, second, high)
        high = tl.where(above_first < target, first, high)
        low = tl.where(above_first < target, low, first)
        low = tl.where(above_second < target, low, second)
        low = tl.where(above_third < target, low, third)
        if COUNT:
            above_low = tl.where(above_first < target, above_low, above_first)
            above_low = tl.where(above_second < target, above_low, above_second)
            above_low = tl.where(above_third < target, above_low, above_third)
    rank, before, index = low, tl.cast(-1, tl.int32), tl.cast(-1, tl.int32)
    if above_low != target:
        rank, index = high, tl.cast(T - 1, tl.int32)
        above, _, _ = _sums_above(ranks, weights, p_row, p_valid, T, high, high, high, BLOCK, COUNT, RESIDENT)
        weight = 1.0 if COUNT else tl.cast(high, tl.float32, bitcast=True)
        missing = tl.ceil((target - above) / weight)
        if _ties_until(ranks, p_row, p_valid, T, rank, index, BLOCK, COUNT, RESIDENT) > missing:
            while index - before > 1:
                middle = before + (index - before) // 2
                enough = _ties_until(ranks, p_row, p_valid, T, rank, middle, BLOCK, COUNT, RESIDENT) >= missing
                before = tl.where(enough, before, middle)
                index = tl.where(enough, middle, index)
    return rank, index
