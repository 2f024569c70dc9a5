"""What a randomised case is, and how it draws its settings."""

import contextlib
import enum
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self, TypeVar

from .bench import Bench

T = TypeVar("T")


class Outcome(enum.Enum):
    """How a case that did not fail ended.

    Attributes:
        PASSED: all was as in the reference.
        TIED: two runs chose different tokens where their scores are equal up to rounding; all before was the same.
        REFUSED: what was asked for was refused, as the documents say.
    """

    PASSED = "passed"
    TIED = "tied"
    REFUSED = "refused"

    def __or__(self, other: "Outcome") -> "Outcome":
        """The outcome of two checks together."""
        return self if other is Outcome.PASSED else other


class Draws(random.Random):
    """A random generator that depends on a category and a seed alone."""

    def __init__(self, category: str, seed: int) -> None:
        super().__init__(f"{category}:{seed}")

    def one_of(self, *choices: T) -> T:
        """One of the arguments."""
        return self.choice(choices)

    def some_of(self, choices: Sequence[T], most: int) -> tuple[T, ...]:
        """Up to `most` different ones of the choices."""
        return tuple(self.sample(list(choices), self.randint(0, min(most, len(choices)))))

    def is_rare(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.random() < share


class Case(ABC):
    """One randomised case of a category; its fields are all that was drawn."""

    @classmethod
    @abstractmethod
    def draw(cls, draws: Draws) -> Self:
        """A case made from `draws` alone."""

    @abstractmethod
    def run(self, bench: Bench) -> Outcome:
        """Runs the case and compares it with its reference; whatever it raises is a failure."""


class Planted(ArithmeticError):
    """An exception that a case plants in a model."""


class PlantedInterrupt(KeyboardInterrupt):
    """A Ctrl-C that a case plants in a model; a real one ends the soak."""


@contextlib.contextmanager
def refused(words: str) -> Iterator[None]:
    """The block must raise a ValueError or TypeError whose message matches `words`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not re.search(words, str(error)):
            raise AssertionError(f"refused, but not with {words!r}: {error}") from error
    else:
        raise AssertionError(f"was not refused; a message with {words!r} was expected")
