"""How rotary factors turn the features of a head: the layouts that models have."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from .positions import Factors

# Rotates states (B, H, n, D) by factors of n positions, cos first where they are a pair.
Rotation = Callable[[torch.Tensor, Factors], torch.Tensor]


def nothing(states: torch.Tensor, factors: Factors) -> torch.Tensor:
    """The states as they are."""
    return states


def _turned(states: torch.Tensor, factors: Factors, *, features: str, given: str, at_end: bool) -> torch.Tensor:
    cos, sin = (factor[:, None].to(states.dtype) for factor in _of_pairs(factors, given))
    width = 2 * cos.shape[-1]
    start = states.shape[-1] - width if at_end else 0
    before, part, behind = states.split([start, width, states.shape[-1] - start - width], dim=-1)
    first, second = part.chunk(2, dim=-1) if features == "halves" else (part[..., 0::2], part[..., 1::2])
    turned = first * cos - second * sin, second * cos + first * sin
    joined = torch.cat(turned, dim=-1) if features == "halves" else torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat([before, joined, behind], dim=-1)


def _of_pairs(factors: Factors, given: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each pair of features, (B or 1, n, rotary dim / 2)."""
    assert factors is not None
    if isinstance(factors, torch.Tensor):
        return factors.real, factors.imag
    if given == "pairs":
        return factors
    part = slice(0, factors[0].shape[-1] // 2) if given == "halves" else slice(0, None, 2)
    return factors[0][..., part], factors[1][..., part]


# The features of a pair are neighbours, or stand in the two halves; factors are given for pairs, or for each feature in
# one of these orders; and the features that are turned come first or last.
LAYOUTS: tuple[Rotation, ...] = (
    nothing,
    *(
        partial(_turned, features=features, given=given, at_end=at_end)
        for at_end, features, given in product(
            (False, True), ("halves", "neighbours"), ("halves", "neighbours", "pairs")
        )
    ),
)
