"""What decode_benchmark.py has measured, as a table and as a plot."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmshiftkv.figures import new_figure
from mmshiftkv.report import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#999999", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#F0E442")
MARKERS = "osD^vPX*"
BARS = 0.62  # of a panel's height; the lines are above


@dataclass(frozen=True)
class Row:
    """One cache at one batch size and prompt length; None where it ran out of memory, or where there is no GPU.

    Attributes:
        cache: its name.
        batch: rows.
        tokens: of each row's prompt.
        new_tokens: generated for each row.
        decoding: "compiled" or "eager".
        milliseconds: per token of a row, the median of the runs' means.
        fastest, slowest: of the runs' means, in milliseconds.
        tokens_per_second: in all rows together.
        cache_bytes: held by the cache after the last token.
        decoding_bytes: allocated at the last token, beyond the model and whatever was there before.
        peak_bytes: of the whole call, likewise.
        graphs: compiled in the run that is not measured.
        graphs_while_measured: compiled later; more than 0 means that the times are not those of decoding alone.
        cudagraph_skips: compiled code that runs without CUDA graphs.
        error: "out of memory", or None.
    """

    cache: str
    batch: int
    tokens: int
    new_tokens: int
    decoding: str
    milliseconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    tokens_per_second: float | None = None
    cache_bytes: int | None = None
    decoding_bytes: int | None = None
    peak_bytes: int | None = None
    graphs: int = 0
    graphs_while_measured: int = 0
    cudagraph_skips: int = 0
    error: str | None = None


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


def draw_plot(rows: Sequence[Row], title: str) -> "Figure":
    """Bars of the time per token, lines of the memory that the cache holds; a panel for each batch size.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
    """
    batches = list(dict.fromkeys(row.batch for row in rows))
    names = list(dict.fromkeys(row.cache for row in rows))
    columns = min(len(batches), 2)
    lines = -(-len(batches) // columns)
    figure = new_figure(max(6.2 * columns, 8.2), 1.2 + 4 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in panels[len(batches) :]:
        unused.remove()
    for panel, batch in zip(panels, batches, strict=False):
        _draw_panel(panel, [row for row in rows if row.batch == batch], names)
        panel.set_title(f"batch {batch}")
    explained = "bars: time per token, median and range of the runs; lines: memory that the cache holds"
    figure.suptitle(f"{title}\n{explained}", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * columns, frameon=False)
    return figure


def _draw_panel(panel: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    lengths = sorted({row.tokens for row in rows})
    memory = panel.twinx()
    sizes = [row.cache_bytes for row in rows if row.cache_bytes]
    unit, unit_name = (2**30, "GiB") if max(sizes, default=0) >= 2**30 else (2**20, "MiB")
    for place, name in enumerate(names):
        of_cache = sorted((row for row in rows if row.cache == name), key=lambda row: row.tokens)
        shift = 0.84 * ((place + 0.5) / len(names) - 0.5)
        style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)]}
        _draw_bars(panel, of_cache, [lengths.index(row.tokens) + shift for row in of_cache], 0.84 / len(names), style)
        # Thinner and smaller from cache to cache, as full caches of both kinds hold all but the same.
        style |= {"marker": MARKERS[place % len(MARKERS)], "markersize": max(10 - 4 * place, 6)}
        held = [row for row in of_cache if row.cache_bytes]
        memory.plot(
            [lengths.index(row.tokens) for row in held],
            [(row.cache_bytes or 0) / unit for row in held],
            linewidth=max(6 - 3.5 * place, 1.5),
            **style,
        )
    panel.set_xticks(range(len(lengths)), [f"{tokens:,}" for tokens in lengths])
    panel.set_xlabel("prompt tokens")
    panel.set_ylabel("time per token (ms)", loc="bottom")
    memory.set_ylabel(f"cache ({unit_name}, log)", loc="top")
    longest = max((row.slowest for row in rows if row.slowest is not None), default=1.0)
    panel.set_ylim(0, longest / BARS)
    panel.locator_params(axis="y", nbins=10)
    panel.set_yticks([tick for tick in panel.get_yticks() if tick <= longest])
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    _limit_memory(memory, [size / unit for size in sizes] or [1.0])


def _draw_bars(panel: Any, rows: Sequence[Row], places: Sequence[float], width: float, style: dict[str, Any]) -> None:
    """One cache's bars; where there is none stands why."""
    decoding = " / ".join(dict.fromkeys(row.decoding for row in rows))
    label = f"{rows[0].cache} ({decoding})"
    for row, place in zip(rows, places, strict=True):
        if row.milliseconds is None or row.fastest is None or row.slowest is None:
            panel.text(place, 0, f"  {row.error}", rotation=90, ha="center", va="bottom", fontsize="small")
            continue
        spread = [[row.milliseconds - row.fastest], [row.slowest - row.milliseconds]]
        panel.bar(place, row.milliseconds, width, yerr=spread, ecolor="black", capsize=2, label=label, **style)
        label = "_nolegend_"


def _limit_memory(axis: Any, sizes: Sequence[float]) -> None:
    """Has the lines take the space above the bars, with ticks there only."""
    low, high = min(sizes), max(sizes)
    ratio = max(high / low, 2.0)
    space = 1 - BARS
    axis.set_yscale("log")
    axis.set_ylim(low / ratio ** ((BARS + 0.2 * space) / (0.65 * space)), high * ratio ** (0.15 / 0.65))
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * power for power in powers for step in steps if low / 1.5 <= step * power <= 1.5 * high]
        if len(ticks) <= 5:
            break
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
