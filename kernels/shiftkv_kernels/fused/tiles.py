"""How the launches of `group_mass` cut their work, from a few coarse facts: nothing is tried out at run time."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from ..device import Gpu

_MOST_PARTS = 16
_FEW_TOKENS = 4096  # so few leave a program too few steps for more stages and larger tiles


class Tiles(NamedTuple):
    """How a launch cuts its work."""

    kept: int  # rows that stay with a program: queries in the first pass, tokens in the second
    streamed: int  # rows that pass by them at a time
    warps: int
    stages: int
    registers: int | None = None  # most of them per thread


@functools.lru_cache
def choose_tiles(head_dim: int, element_size: int, tokens: int, gpu: Gpu) -> tuple[Tiles, Tiles]:
    """The tiles of both passes.  Those for 16-bit inputs on Hopper are measured, the others only known to fit."""
    if element_size == 4:
        tiles = Tiles(kept=64, streamed=64, warps=8, stages=1)
        return tiles, tiles
    if not gpu.has_warpgroup_products:
        tiles = Tiles(kept=64, streamed=64 if head_dim <= 128 else 32, warps=4, stages=2)
        return tiles, tiles
    if head_dim > 128:
        tiles = Tiles(kept=128, streamed=128, warps=8, stages=2)
        return tiles, tiles
    # 128 registers leave room for a second program, whose products run under the first one's exponentials.
    tiles = Tiles(kept=128, streamed=128, warps=8, stages=2, registers=128)
    return tiles._replace(streamed=64, stages=3) if tokens > _FEW_TOKENS else tiles, tiles


@functools.lru_cache
def choose_value_tiles(head_dim: int, element_size: int, tokens: int, gpu: Gpu) -> tuple[Tiles, Tiles]:
    """The tiles of both passes of `value_scores`."""
    first, second = choose_tiles(head_dim, element_size, tokens, gpu)
    if element_size == 2 and head_dim <= 128 and gpu.has_warpgroup_products and tokens > _FEW_TOKENS:
        second = Tiles(kept=256, streamed=64, warps=8, stages=2)
    return first, second


Choose = Callable[[int, int, int, Gpu], tuple[Tiles, Tiles]]


@functools.lru_cache
def tiles_of_all_lengths(
    choose: Choose, head_dim: int, element_size: int, gpu: Gpu
) -> tuple[tuple[Tiles, ...], tuple[Tiles, ...]]:
    """The tiles of the first pass and those of the second that `choose` gives prompts of one length or another."""
    few, many = (choose(head_dim, element_size, tokens, gpu) for tokens in (_FEW_TOKENS, _FEW_TOKENS + 1))
    return (few[0], many[0]), (few[1], many[1])


@functools.lru_cache
def choose_attend_tiles(head_dim: int, element_size: int, gpu: Gpu) -> Tiles:
    """The tiles of `attend`: queries stay, tokens pass by."""
    if element_size == 4:
        return Tiles(kept=32, streamed=32, warps=4, stages=1)
    if not gpu.has_warpgroup_products:
        return Tiles(kept=64, streamed=32, warps=4, stages=2)
    if head_dim > 128:
        return Tiles(kept=64, streamed=64, warps=8, stages=2)
    return Tiles(kept=128, streamed=64, warps=8, stages=3)


@functools.lru_cache
def split(programs: int, steps: int, multiprocessors: int) -> tuple[int, int]:
    """Into how many parts to split the `steps` of each program, and steps per part.

    Two programs share a multiprocessor, so that one's products run under the other's exponentials.  The best split
    leaves the fewest steps in a row; of equally good ones the smallest is taken.
    """
    places = 2 * multiprocessors

    def steps_in_a_row(parts: int) -> int:
        return -(programs * parts // -places) * -(steps // -parts)

    parts = min(range(1, min(steps, _MOST_PARTS) + 1), key=lambda parts: (steps_in_a_row(parts), parts))
    per_part = -(steps // -parts)
    return -(steps // -per_part), per_part
