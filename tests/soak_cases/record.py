"""What a soak has run so far, as a file that it can be resumed from."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.report import table, write_record

from .case import Outcome

SEEDS_OF_ONE_SOAK = 1_000_000


@dataclass
class Count:
    """How the cases of one category ended, and how long they took."""

    cases: int = 0
    failures: int = 0
    refused: int = 0
    tied: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome | None, seconds: float) -> None:
        """Counts a case; None: it failed."""
        self.cases += 1
        self.failures += outcome is None
        self.refused += outcome is Outcome.REFUSED
        self.tied += outcome is Outcome.TIED
        self.seconds += seconds


@dataclass
class Failure:
    """A case that failed.

    Attributes:
        category, seed: they make the case.
        device: where it failed.
        case: what was drawn.
        error: the exception and its place, as Python prints them.
        repeats: whether it failed once more, alone and with a model built anew.
        before: the cases that ran before it, newest last.
    """

    category: str
    seed: int
    device: str
    case: str
    error: str
    repeats: bool
    before: list[str]


@dataclass
class Record:
    """All counts of a soak.

    Attributes:
        seed: as given; categories begin with the seed times a million.
        environment: where it ran.
        counts: by category.
        next_seeds: by category.
        failures: in the order in which they were met.
        running: the case under way, or the last one.
    """

    seed: int
    environment: dict[str, str | None]
    counts: dict[str, Count] = field(default_factory=dict)
    next_seeds: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    running: str = ""

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        counts = {name: Count(**count) for name, count in data.pop("counts").items()}
        failures = [Failure(**failure) for failure in data.pop("failures")]
        return cls(**data, counts=counts, failures=failures)

    def save(self, path: Path) -> None:
        """Writes the record; an interrupt leaves the old file or the new one."""
        unfinished = path.with_name(path.name + ".new")
        write_record(unfinished, asdict(self))
        unfinished.replace(path)

    def take_seed(self, category: str) -> int:
        """The seed of the category's next case."""
        seed = self.next_seeds.get(category, self.seed * SEEDS_OF_ONE_SOAK)
        self.next_seeds[category] = seed + 1
        return seed

    def give_back_seed(self, category: str) -> None:
        """The case was interrupted: the next one is the same."""
        self.next_seeds[category] -= 1

    def count_of(self, category: str) -> Count:
        """The counts of a category, made when first asked for."""
        return self.counts.setdefault(category, Count())

    @property
    def cases(self) -> int:
        """Cases of all categories."""
        return sum(count.cases for count in self.counts.values())

    def __str__(self) -> str:
        rows = [_row(name, count) for name, count in self.counts.items()]
        return table(
            ("category", "cases", "failures", "refused", "tied", "seconds", "cases/s"),
            rows,
            [_row("all", _sum(self.counts.values()))],
            left=("category",),
        )


def _row(name: str, count: Count) -> list[str]:
    speed = f"{count.cases / count.seconds:.1f}" if count.seconds else "-"
    numbers = (count.cases, count.failures, count.refused, count.tied)
    return [name, *map(str, numbers), f"{count.seconds:.1f}", speed]


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        for name, value in asdict(count).items():
            setattr(total, name, getattr(total, name) + value)
    return total
