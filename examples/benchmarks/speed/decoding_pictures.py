"""The pictures that speed_and_memory.py draws of decoding: of the time per token, and of the memory of the caches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.speed.rows import Row
from mmshiftkv.analysis.figures import new_figure
from mmshiftkv.report import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#999999", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#F0E442")
MARKERS = "osD^vPX*"
PANEL_HEIGHT = 3.6  # inches
GROUP = 0.84  # of the space of a length; the bars of its caches
CROWDED = 20  # bars in a panel, from which on they are narrower and their values upright


@dataclass(frozen=True)
class _Style:
    """How one cache is drawn: its colour and marker, and whether it is another one, decoded in another way."""

    colour: str
    marker: str
    decoded_otherwise: bool = False


def draw_time(rows: Sequence[Row], title: str) -> "Figure":
    """Bars of the time per token, median and range of the runs; a panel for each batch size, all with one scale.

    A cache named like another one with more behind a comma is the same, decoded in another way: it has the same colour,
    hatched.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
    """
    of_batch, styles = _by_batch(rows), _styles(rows)
    lengths = [len({row.tokens for row in some}) for some in of_batch.values()]
    bar = 0.28 if max(lengths) * len(styles) <= CROWDED else 0.2
    widths = [1.0 + bar / GROUP * len(styles) * count for count in lengths]
    figure, panels = _empty_panels(widths, "time per token (ms)")
    figure.suptitle(f"Time per token, median and range of the runs ({title})", fontsize="medium")
    slowest = max((row.slowest for row in rows if row.slowest is not None), default=1.0)
    for panel, (batch, of_panel) in zip(panels, of_batch.items(), strict=True):
        _draw_times(panel, of_panel, styles)
        panel.set_title(f"batch {batch}", fontsize="medium")
        panel.set_ylim(0, 1.1 * slowest)
    _draw_legend(figure, panels)
    return figure


def draw_memory(rows: Sequence[Row], title: str) -> "Figure":
    """Lines of the memory that each cache holds after the last token; a panel for each batch size, all with one scale.

    A cache decoded in two ways holds the same and has one line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
    """
    styles = {name: style for name, style in _styles(rows).items() if not style.decoded_otherwise}
    of_batch = _by_batch([row for row in rows if row.cache in styles])
    figure, panels = _empty_panels([4.2] * len(of_batch), "memory of the cache, log")
    figure.suptitle(f"Memory that the cache holds ({title})", fontsize="medium")
    sizes = [row.cache_bytes for row in rows if row.cache_bytes] or [1]
    low, high = min(sizes) / 1.6, max(sizes) * 1.6
    powers = [2**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    ticks = powers[:: -(-len(powers) // 7)]
    for panel, (batch, of_panel) in zip(panels, of_batch.items(), strict=True):
        _draw_sizes(panel, of_panel, styles)
        panel.set_title(f"batch {batch}", fontsize="medium")
        panel.set_yscale("log", base=2)
        panel.set_ylim(low, high)
        panel.set_yticks(ticks, [format_bytes(tick).replace(".00", "").replace(".0", "") for tick in ticks])
        panel.minorticks_off()
    _draw_legend(figure, panels)
    return figure


def _by_batch(rows: Sequence[Row]) -> dict[int, list[Row]]:
    of_batch: dict[int, list[Row]] = {}
    for row in rows:
        of_batch.setdefault(row.batch, []).append(row)
    return of_batch


def _styles(rows: Sequence[Row]) -> dict[str, _Style]:
    """Those of the caches, by name."""
    names = list(dict.fromkeys(row.cache for row in rows))
    styles: dict[str, _Style] = {}
    for name in names:
        same = next((other for other in names if name.startswith(f"{other}, ")), None)
        if same in styles:
            styles[name] = replace(styles[same], decoded_otherwise=True)
        else:
            place = sum(not style.decoded_otherwise for style in styles.values())
            styles[name] = _Style(COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
    return styles


def _empty_panels(widths: Sequence[float], label: str) -> tuple["Figure", list[Any]]:
    """Panels that are so many inches wide, two in a line, with one vertical scale and its label on the left."""
    columns = min(len(widths), 2)
    lines = -(-len(widths) // columns)
    of_column = [max(*widths[column::columns], 3.2) for column in range(columns)]
    figure = new_figure(max(sum(of_column), 8.2), 1.2 + PANEL_HEIGHT * lines)
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False, width_ratios=of_column).flat)
    for panel in panels[::columns]:
        panel.set_ylabel(label)
    for unused in panels[len(widths) :]:
        unused.remove()
    return figure, panels[: len(widths)]


def _draw_legend(figure: "Figure", panels: Sequence[Any]) -> None:
    """All caches of all panels below them, each once."""
    drawn = [pair for panel in panels for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in drawn}
    columns = min(int(figure.get_figwidth() // 3.6), 3)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(list(handles.values()), list(handles), **place, fontsize="small")


def _draw_times(panel: Any, rows: Sequence[Row], styles: Mapping[str, _Style]) -> None:
    lengths = sorted({row.tokens for row in rows})
    width = GROUP / len(styles)
    for place, (name, style) in enumerate(styles.items()):
        of_cache = sorted((row for row in rows if row.cache == name), key=lambda row: row.tokens)
        shift = (place + 0.5) * width - GROUP / 2
        _draw_bars(panel, of_cache, [lengths.index(row.tokens) + shift for row in of_cache], width, style)
    for value in panel.texts:
        value.set_rotation(90 if len(lengths) * len(styles) > CROWDED else value.get_rotation())
    panel.set_xticks(range(len(lengths)), [f"{tokens:,}" for tokens in lengths])
    panel.set_xlim(-0.5, len(lengths) - 0.5)
    panel.set_xlabel("prompt tokens")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)


def _draw_bars(panel: Any, rows: Sequence[Row], places: Sequence[float], width: float, style: _Style) -> None:
    """One cache's bars with their values; where there is none stands why."""
    decoding = " / ".join(dict.fromkeys(row.decoding for row in rows))
    look: dict[str, Any] = {"facecolor": style.colour, "edgecolor": "white", "linewidth": 0}
    look["hatch"] = "////" if style.decoded_otherwise else None
    for row, place in zip(rows, places, strict=True):
        if row.milliseconds is None or row.fastest is None or row.slowest is None:
            panel.text(place, 0, f"  {row.error}", rotation=90, ha="center", va="bottom", fontsize="small")
            continue
        panel.bar(place, row.milliseconds, width, label=f"{row.cache} ({decoding})", **look)
        spread = [[row.milliseconds - row.fastest], [row.slowest - row.milliseconds]]
        panel.errorbar(place, row.milliseconds, spread, ecolor="black", capsize=2)
        value = f"{row.milliseconds:.1f}" if row.milliseconds < 100 else f"{row.milliseconds:.0f}"
        offset = {"xytext": (0, 3), "textcoords": "offset points"}
        panel.annotate(value, (place, row.slowest), **offset, ha="center", va="bottom", fontsize="small")


def _draw_sizes(panel: Any, rows: Sequence[Row], styles: Mapping[str, _Style]) -> None:
    """Lines by the prompt's length, each thinner than the one before: both full caches hold all but the same."""
    for place, (name, style) in enumerate(styles.items()):
        held = sorted((row.tokens, row.cache_bytes) for row in rows if row.cache == name and row.cache_bytes)
        panel.plot(
            [tokens for tokens, _ in held],
            [size for _, size in held],
            label=name,
            color=style.colour,
            marker=style.marker,
            markersize=max(10 - 4 * place, 6),
            linewidth=max(6 - 3.5 * place, 1.5),
        )
    lengths = sorted({row.tokens for row in rows})
    panel.set_xscale("log", base=2)
    panel.margins(x=0.09)
    panel.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    panel.set_xlabel("prompt tokens, log")
    panel.grid(alpha=0.3)
