"""Where tokens are, as a model tells its attention modules."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

# Rotary factors: cos and sin (some models: sin and cos), one complex tensor, or None where a layer rotates nothing.
Factors = tuple[torch.Tensor, torch.Tensor] | torch.Tensor | None


@dataclass(frozen=True)
class Positions:
    """The positions of t tokens, in the forms in which attention modules take them.

    Attributes:
        factors: rotary factors: a pair of (B or 1, t, rotary dim), cos and sin in the model's order; or one complex
            tensor (B or 1, t, rotary dim / 2); or None.
        ids: position ids, (B or 1, t), with several axes (axes, B or 1, t); None where the module takes none.
        columns: (t,) int64, how many tokens of the row came before, padding counted; None where nobody asks for it.
    """

    factors: Factors
    ids: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @cached_property
    def last(self) -> "Positions":
        """That of the last token."""
        return self.tokens(-1)

    @cached_property
    def made(self) -> dict[Hashable, Any]:
        """What was made of them for one layer and serves others, by what else it depends on."""
        return {}

    def tokens(self, start: int, stop: int | None = None) -> "Positions":
        """The part of tokens start to stop."""
        part = slice(start, stop)
        ids = None if self.ids is None else self.ids[..., part]
        columns = None if self.columns is None else self.columns[part]
        return Positions(map_factors(lambda factor: factor[:, part], self.factors), ids, columns)

    def copied(self) -> "Positions":
        """The same in storage of its own."""
        ids = None if self.ids is None else self.ids.clone()
        return Positions(map_factors(torch.Tensor.clone, self.factors), ids, self.columns)

    def repeated(self, times: int) -> "Positions":
        """All of them, so many times over."""
        ids = None if self.ids is None else self.ids.repeat(*[1] * (self.ids.ndim - 1), times)
        columns = None if self.columns is None else self.columns.repeat(times)
        return Positions(map_factors(lambda factor: factor.repeat(1, times, 1), self.factors), ids, columns)

    def followed_by(self, later: "Positions") -> "Positions":
        """These and behind them others, of the same form."""
        ids = columns = None
        if self.ids is not None and later.ids is not None:
            ids = torch.cat([self.ids, later.ids], dim=-1)
        if self.columns is not None and later.columns is not None:
            columns = torch.cat([self.columns, later.columns])
        return Positions(_joined(self.factors, later.factors), ids, columns)

    def is_that_of(self, other: "Positions") -> bool:
        """Whether both are made of the same tensors."""
        return self.factors is other.factors and self.ids is other.ids and self.columns is other.columns

    def with_factors(self, factors: Factors) -> "Positions":
        """The same positions with other rotary factors."""
        return replace(self, factors=factors)


def map_factors(change: Callable[[torch.Tensor], torch.Tensor], factors: Factors) -> Factors:
    """`change` of each tensor of the factors."""
    if factors is None or isinstance(factors, torch.Tensor):
        return None if factors is None else change(factors)
    return change(factors[0]), change(factors[1])


def _joined(first: Factors, second: Factors) -> Factors:
    if first is None or second is None:
        return None
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        assert isinstance(first, torch.Tensor)
        assert isinstance(second, torch.Tensor)
        return torch.cat([first, second], dim=1)
    return torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]], dim=1)
