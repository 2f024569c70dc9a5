"""What decoding.py has measured, as a table."""

from collections.abc import Sequence

from benchmarks.speed.rows import Row
from mmshiftkv.report import format_bytes


def table(rows: Sequence[Row]) -> str:
    """One line a row under a header, a dash where there is no number, and what the columns are."""
    header = ["batch", "tokens", "cache", "decoding", "ms/token", "(min - max)", "tokens/s"]
    header += ["cache holds", "at last token", "peak", "graphs"]
    cells = [header, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = header.index("cache"), header.index("decoding")
    lines = [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([*lines, "", *_notes(rows)])


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
