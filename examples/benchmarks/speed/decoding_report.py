"""How speed_and_memory.py shows decoding: a table and two pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.speed.rows import Row, read
from mmshiftkv.report import format_bytes

HEADER = ["batch", "tokens", "cache", "decoding", "ms/token", "(min - max)", "tokens/s"]
HEADER += ["cache holds", "at last token", "peak", "graphs"]


def show(records: Sequence[dict[str, Any]], plot: Path | None) -> None:
    """Prints the rows of all records under what they have in common; draws them, if there is a `plot`.

    Raises:
        ValueError: they are of different models, numbers of new tokens or devices.
    """
    conditions, rows_of_records = zip(*map(read, records), strict=True)
    if len(set(conditions)) > 1:
        raise ValueError(f"--read: these cannot be shown together: {'; '.join(sorted(set(conditions)))}")
    rows = [row for rows in rows_of_records for row in rows]
    print(conditions[0], table(rows), sep="\n\n")
    if plot:
        from benchmarks.speed.decoding_pictures import draw_memory, draw_time

        for name, draw in (("time", draw_time), ("memory", draw_memory)):
            path = plot.with_stem(f"{plot.stem}_{name}")
            draw(rows, conditions[0]).savefig(path, dpi=150)
            print(f"written: {path}")


def table(rows: Sequence[Row]) -> str:
    """One line a row under a header, a dash where there is no number, and what the columns are."""
    return "\n".join([report.table(HEADER, map(_cells, rows), left=("cache", "decoding")), "", *_notes(rows)])


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = ["ms/token: median of the runs; tokens/s: of all rows of the batch together"]
    if any(row.peak_bytes is not None for row in rows):
        notes.append("at last token, peak: allocated on the GPU beyond the model, also for prefill and compiled code")
    if any(row.decoding == "compiled" for row in rows):
        notes.append("graphs: compiled at this length; where there are none, those of an earlier length serve")
    if any(row.graphs_while_measured for row in rows):
        notes.append("+ n: n graphs were compiled while time was measured, so that it is not that of decoding alone")
    if any(row.cudagraph_skips for row in rows):
        notes.append("*: part of what was compiled runs without CUDA graphs")
    return notes


def _cells(row: Row) -> list[str]:
    head = [str(row.batch), f"{row.tokens:,}", row.cache, row.decoding]
    if row.milliseconds is None:
        return [*head, row.error or "-", *["-"] * 6]
    graphs = f"{row.graphs} + {row.graphs_while_measured}" if row.graphs_while_measured else str(row.graphs)
    graphs += "*" if row.cudagraph_skips else ""
    return [
        *head,
        f"{row.milliseconds:.2f}",
        f"({row.fastest:.2f} - {row.slowest:.2f})",
        f"{row.tokens_per_second:.1f}",
        *(
            "-" if size is None else format_bytes(size)
            for size in (row.cache_bytes, row.decoding_bytes, row.peak_bytes)
        ),
        graphs if row.decoding == "compiled" else "-",
    ]
