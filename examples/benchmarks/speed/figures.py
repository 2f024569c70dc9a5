"""What a record of speed_and_memory.py says, as figures that another run's can be compared with.

Times are compared as ratios to something of the same run that this library has no part in, because those of two hosts
are several times apart:

- of decoding: to the full caches, a compiled cache to StaticCache, an eager one to DynamicCache too.  A ratio between
  what is compiled and what is eager is that of a GPU to a host's Python: it is shown and not judged;
- of a prefill: to that with DynamicCache;
- of one layer's selection: to the least time that its operations and bytes need at the rates measured in that run.
  Launched one by one it waits for the host: not judged;
- of a cold start: to that with StaticCache, if both are compiled;
- of prompts of many lengths: their median to that with DynamicCache.

Bytes and counts are compared as they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.speed.rows import Row, read

FULL_CACHES = ("DynamicCache", "StaticCache")
Key = tuple[str, str]  # the case and what was measured of it, both in words


@dataclass(frozen=True)
class Figure:
    """One thing that was measured.

    Attributes:
        kind: "time": a ratio of times; "held": bytes that a cache holds, the same at each run; "allocated": bytes that
            an allocator counted; "count": of what there should be no more.
        value: the ratio, the bytes or the count.
        spread: of a ratio, half the range of the runs as a share of it.
        judged: whether a worse one is a fault.
    """

    kind: Literal["time", "held", "allocated", "count"]
    value: float
    spread: float = 0.0
    judged: bool = True


@dataclass(frozen=True)
class Time:
    """The median, the fastest and the slowest of several runs, in the same unit."""

    median: float
    fastest: float
    slowest: float

    def to(self, other: "Time", *, judged: bool = True) -> Figure:
        """The ratio to another time; what both runs spread adds up in squares, as they are independent."""
        shares = [(time.slowest - time.fastest) / 2 / time.median for time in (self, other)]
        spread = sum(share**2 for share in shares) ** 0.5
        return Figure("time", self.median / other.median, spread, judged)


def what_it_is_of(record: Mapping[str, Any]) -> Literal["decoding", "selection", "starts"]:
    """What a record was measured of."""
    if "selection" in record:
        return "selection"
    return "starts" if "cold_starts" in record else "decoding"


def conditions(record: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for two records to be compared; figures carry the rest in their keys.

    Raises:
        LookupError: it is no record of speed_and_memory.py.
    """
    settings, device, kind = record["settings"], record["environment"]["device"], what_it_is_of(record)
    names = {"selection": ("tiny",), "decoding": ("model", "dtype", "attention")}
    names["starts"] = (*names["decoding"], "lengths", "new_tokens")
    return {
        "measured": kind,
        **{name: settings[name] for name in names[kind]},
        "device": "CPU" if device.startswith("cpu") else "GPU",
    }


def figures(record: Mapping[str, Any]) -> dict[Key, Figure]:
    """All figures of a record, by case and what was measured.

    Raises:
        LookupError, TypeError: it is no record of speed_and_memory.py.
    """
    conditions(record)
    kind = what_it_is_of(record)
    if kind == "selection":
        return dict([*_of_selections(record["selection"]), *_of_prefills(record["prefill"])])
    if kind == "starts":
        return dict([*_of_cold_starts(record["cold_starts"]), *_of_prompts(record["prompts"])])
    return dict(_of_decoding(read(dict(record))[1]))


def _of_decoding(rows: list[Row]) -> Iterator[tuple[Key, Figure]]:
    by_case = {(row.batch, row.tokens, row.new_tokens, row.cache): row for row in rows}
    for row in rows:
        case = f"{row.batch} x {row.tokens:,} + {row.new_tokens:,}, {row.cache}"
        yield (case, "runs out of memory"), Figure("count", int(row.error is not None))
        if row.milliseconds is None:
            continue
        yield (case, "decoded eagerly"), Figure("count", int(row.decoding == "eager"))
        for name in ("graphs_while_measured", "cudagraph_skips"):
            yield (case, name.replace("_", " ")), Figure("count", getattr(row, name))
        if row.cache_bytes is not None:
            yield (case, "held by the cache"), Figure("held", row.cache_bytes)
        for name, size in (("at the last token", row.decoding_bytes), ("peak", row.peak_bytes)):
            if size is not None:
                yield (case, name), Figure("allocated", size)
        for full in FULL_CACHES:
            other = by_case.get((row.batch, row.tokens, row.new_tokens, full))
            if row.cache not in FULL_CACHES and other is not None and other.milliseconds is not None:
                judged = row.decoding == other.decoding
                yield (case, f"time to {full}'s"), _time(row).to(_time(other), judged=judged)


def _time(row: Row) -> Time:
    if row.milliseconds is None or row.fastest is None or row.slowest is None:
        raise TypeError(f"{row.cache}: a row without an error has a median, a fastest and a slowest time")
    return Time(row.milliseconds, row.fastest, row.slowest)


def _of_selections(rows: list[dict[str, Any]]) -> Iterator[tuple[Key, Figure]]:
    for row in rows:
        case = f"selection, {row['batch']} x {row['tokens']:,}, {row['method']}, budget {row['budget']}"
        least = row["floor_products"] + row["floor_bytes"]
        yield (case, "time to the least"), Figure("time", row["selection"] / least)
        yield (case, "time launched one by one"), Figure("time", row["eager"] / least, judged=False)
        if row["launches"] is not None:
            yield (case, "launches"), Figure("count", row["launches"])
        yield (case, "extra memory"), Figure("allocated", row["extra_memory"] * 2**20)


def _of_prefills(rows: list[dict[str, Any]]) -> Iterator[tuple[Key, Figure]]:
    times = {
        (row["batch"], row["tokens"], row["cache"]): Time(row["seconds"], row["fastest"], row["slowest"])
        for row in rows
    }
    for row in rows:
        case = f"prefill, {row['batch']} x {row['tokens']:,}, {row['cache']}"
        full = times.get((row["batch"], row["tokens"], "DynamicCache"))
        if full and row["cache"] != "DynamicCache":
            time = times[row["batch"], row["tokens"], row["cache"]]
            yield (case, "time to DynamicCache's"), time.to(full)
        if row["peak"]:  # nothing is counted without a GPU
            yield (case, "peak"), Figure("allocated", row["peak"])
            yield (case, "held after it"), Figure("allocated", row["held"])


def _of_cold_starts(rows: list[dict[str, Any]]) -> Iterator[tuple[Key, Figure]]:
    times = {row["cache"]: Time(row["second_token"], row["fastest"], row["slowest"]) for row in rows}
    decoding = {row["cache"]: row["decoding"] for row in rows}
    for row in rows:
        case = f"cold start, {row['cache']}"
        yield (case, "decoded eagerly"), Figure("count", int(row["decoding"] == "eager"))
        for name in ("graphs", "kernels"):
            yield (case, f"{name} compiled"), Figure("count", row[name])
        if row["cache"] not in FULL_CACHES and "StaticCache" in times:
            judged = row["decoding"] == decoding["StaticCache"]
            yield (case, "time to StaticCache's"), times[row["cache"]].to(times["StaticCache"], judged=judged)


def _of_prompts(rows: list[dict[str, Any]]) -> Iterator[tuple[Key, Figure]]:
    medians = {row["cache"]: row["median"] for row in rows}
    for row in rows:
        case = f"{len(row['tokens'])} prompts, {row['cache']}"
        yield (case, "compiled again"), Figure("count", row["compiled_later"])
        if row["cache"] != "DynamicCache" and "DynamicCache" in medians:
            yield (case, "time to DynamicCache's"), Figure("time", row["median"] / medians["DynamicCache"])
