"""Compares a run of speed_and_memory.py with what was recorded of an earlier one, and says what became worse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import report
from benchmarks.speed.figures import Figure, Key, conditions, figures

TOLERANCE = 0.1
ALLOCATED_SHARE, ALLOCATED_BYTES = 0.02, 16 * 2**20
EXPLANATION = f"""\
Times are ratios within one run. One is slower if it grew by more than the tolerance and the spread of its runs, faster
if it shrank by as much; one in brackets depends on the host's Python and is not judged. Allocated bytes may grow by
{ALLOCATED_SHARE:.0%} and {ALLOCATED_BYTES // 2**20} MiB, bytes that a cache holds and counts not at all."""


@dataclass(frozen=True)
class Change:
    """One figure, as recorded and now.

    Attributes:
        allowed: how much larger than what was recorded it may be: a share of a ratio, else bytes or a number.
    """

    key: Key
    recorded: Figure
    now: Figure
    allowed: float

    @property
    def verdict(self) -> str:
        """ "slower", "more", "faster", "less", or "as recorded"."""
        old, new = self.recorded.value, self.now.value
        if self.recorded.kind == "time":
            limits, words = (old / (1 + self.allowed), old * (1 + self.allowed)), ("faster", "slower")
        else:
            limits, words = (old - self.allowed, old + self.allowed), ("less", "more")
        return words[0] if new < limits[0] else words[1] if new > limits[1] else "as recorded"

    @property
    def judged(self) -> bool:
        """Whether it would be a fault if it were worse."""
        return self.recorded.judged and self.now.judged

    @property
    def is_worse(self) -> bool:
        """Whether it is one."""
        return self.judged and self.verdict in ("slower", "more")


@dataclass(frozen=True)
class Comparison:
    """A record beside the run that it was compared with.

    Attributes:
        changes: what both have measured.
        not_compared: in sentences, what the run lacks, and why.
        notes: what may be a reason for changes.
    """

    changes: list[Change]
    not_compared: list[str]
    notes: list[str]

    @property
    def times(self) -> int:
        """How many ratios of times were judged."""
        return sum(change.judged and change.recorded.kind == "time" for change in self.changes)

    @property
    def passed(self) -> bool:
        """Whether nothing is worse, and at least one time was judged."""
        return self.times > 0 and not any(change.is_worse for change in self.changes)


def compare(now: Sequence[Mapping[str, Any]], recorded: Mapping[str, Any], tolerance: float = TOLERANCE) -> Comparison:
    """What changed from a record to the files of a run; only those of them count that were measured as the record was.

    Args:
        tolerance: how much larger a ratio may be, as a share of it, beside what its runs spread.
    """
    wanted = conditions(recorded)
    not_compared: list[str] = []
    notes: list[str] = []
    new: dict[Key, Figure] = {}
    for record in now:
        found = conditions(record)
        if found == wanted:
            new |= figures(record)
            notes += _differences(record, recorded)
        else:
            not_compared.append(f"other settings: {_in_words(found)}; recorded: {_in_words(wanted)}")
    old = figures(recorded)
    if new:
        not_compared += _only_in(old, new, "recorded, not measured now")
    changes = [Change(key, old[key], new[key], _allowed(old[key], new[key], tolerance)) for key in old if key in new]
    return Comparison(changes, not_compared, list(dict.fromkeys(notes)))


def _in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _allowed(old: Figure, new: Figure, tolerance: float) -> float:
    if old.kind == "time":
        return tolerance + (old.spread**2 + new.spread**2) ** 0.5
    return ALLOCATED_SHARE * old.value + ALLOCATED_BYTES if old.kind == "allocated" else 0.0


def _differences(now: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    old, new = recorded["environment"], now["environment"]
    notes = [
        f"{name}: {old.get(name)} when recorded, {new.get(name)} now"
        for name in ("device", "torch", "transformers", "triton")
        if new.get(name) != old.get(name)
    ]
    for when, record in (("recorded", recorded), ("measured now", now)):
        if record["settings"].get("repeats") == 1:
            notes.append(f"{when} from one run each: what runs spread is not known")
    return notes


def _only_in(some: Mapping[Key, Figure], others: Mapping[Key, Figure], reason: str) -> list[str]:
    """A sentence for each case that the others lack, or else for each figure of it."""
    cases = {case for case, _ in others}
    missing = [f"{case}, {what}" if case in cases else case for case, what in some if (case, what) not in others]
    return [f"{reason}: {name}" for name in dict.fromkeys(missing)]


def show(name: str, comparison: Comparison) -> None:
    """Prints all ratios and what else changed, what could not be compared, and what that comes to."""
    print(f"\ncompared with {name}")
    for note in comparison.notes:
        print(f"note: {note}")
    shown = [one for one in comparison.changes if one.recorded.kind == "time" or one.verdict != "as recorded"]
    if shown:
        header = ["case", "what", "recorded", "now", "change", "allowed", "verdict"]
        print(report.table(header, map(_cells, shown), left=("case", "what", "verdict")))
    for sentence in comparison.not_compared:
        print(f"not compared: {sentence}")
    worse = [change for change in comparison.changes if change.is_worse]
    better = sum(change.judged and change.verdict in ("faster", "less") for change in comparison.changes)
    print(f"{len(comparison.changes)} figures compared, {comparison.times} of them times that are judged; ", end="")
    print(f"{len(worse)} worse, {better} better")
    for change in worse:
        case, what = change.key
        print(f"{change.verdict}: {case}: {what} {_shown(change.recorded)} -> {_shown(change.now)}")
    if not comparison.times:
        print("failed: no time could be compared")


def _cells(change: Change) -> list[str]:
    old, new = change.recorded.value, change.now.value
    verdict = change.verdict if change.judged else f"({change.verdict})"
    if change.recorded.kind == "time":
        differences = [f"{new / old - 1:+.1%}", f"+{change.allowed:.1%}"]
    else:
        differences = [_shown(change.now, new - old, "+"), _shown(change.now, change.allowed, "+")]
    return [*change.key, _shown(change.recorded), _shown(change.now), *differences, verdict]


def _shown(figure: Figure, value: float | None = None, sign: str = "") -> str:
    value = figure.value if value is None else value
    if figure.kind == "time":
        return f"{value:.3f}"
    return f"{value:{sign},.0f}" + ("" if figure.kind == "count" else " bytes")


def check(now: Sequence[Mapping[str, Any]], recorded: Mapping[str, Mapping[str, Any]], tolerance: float) -> None:
    """Compares a run with each of the records, by their names, and prints what came of it.

    Raises:
        SystemExit: with status 1: something became worse, or of one of the records no time could be compared.
    """
    comparisons = {name: compare(now, record, tolerance) for name, record in recorded.items()}
    for name, comparison in comparisons.items():
        show(name, comparison)
    print()
    new, old = (
        dict(one for record in records for one in figures(record).items()) for records in (now, recorded.values())
    )
    for sentence in _only_in(new, old, "measured now, in no record"):
        print(f"not compared: {sentence}")
    print(f"{EXPLANATION} Tolerance: {tolerance:.0%}.")
    if not all(comparison.passed for comparison in comparisons.values()):
        raise SystemExit(1)
