"""The picture that speed_and_memory.py draws of decoding."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.speed.rows import Row
from mmshiftkv.analysis.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#999999", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#F0E442")
MARKERS = "osD^vPX*"
BARS = 0.62  # of a panel's height; the lines are above
GROUP = 0.84  # of the space of a length; the bars of its caches
CROWDED = 20  # bars in a panel, from which on they are narrower and their values upright


def draw_plot(rows: Sequence[Row], title: str) -> "Figure":
    """Bars of the time per token, lines of the memory that the cache holds; a panel for each batch size.

    Where one cache takes more than twice as long as any other, and there are several others to compare, its bars are
    broken.
    A cache named like another one with more behind a comma is the same, decoded in another way: it has the same colour,
    hatched, and no line of its own.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
    """
    of_batch: dict[int, list[Row]] = {}
    for row in rows:
        of_batch.setdefault(row.batch, []).append(row)
    styles = _styles(list(dict.fromkeys(row.cache for row in rows)))
    figure, panels = _empty_panels([len({row.tokens for row in some}) for some in of_batch.values()], len(styles))
    for panel, (batch, of_panel) in zip(panels, of_batch.items(), strict=True):
        _draw_panel(panel, of_panel, styles)
        panel.set_title(f"batch {batch}")
    explained = "bars: time per token in ms, median and range of the runs; lines: memory that the cache holds"
    figure.suptitle(f"{title}\n{explained}", fontsize="medium")
    handles = {label: bar for panel in panels for bar, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    order = sorted(handles, key=lambda label: list(styles).index(label.rpartition(" (")[0]))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(int(figure.get_figwidth() // 3.6), 3)}
    figure.legend([handles[one] for one in order], order, **place, frameon=False, fontsize="small")
    return figure


@dataclass(frozen=True)
class _Style:
    """How one cache is drawn; `place` counts the caches with a line."""

    colour: str
    place: int
    has_line: bool


def _styles(names: Sequence[str]) -> dict[str, _Style]:
    """Those of the caches, by name."""
    styles: dict[str, _Style] = {}
    for name in names:
        same = next((other for other in names if name.startswith(f"{other}, ")), None)
        place = sum(style.has_line for style in styles.values())
        if same in styles:
            styles[name] = replace(styles[same], has_line=False)
        else:
            styles[name] = _Style(COLOURS[place % len(COLOURS)], place, has_line=True)
    return styles


def _empty_panels(lengths: Sequence[int], caches: int) -> tuple["Figure", list[Any]]:
    """A panel for each batch size, with so many lengths, two in a line; as wide as its bars need."""
    columns = min(len(lengths), 2)
    lines = -(-len(lengths) // columns)
    bar = 0.27 if max(lengths) * caches <= CROWDED else 0.17
    widths = [max(1.6 + bar / GROUP * caches * max(lengths[column::columns]), 3.2) for column in range(columns)]
    figure = new_figure(max(sum(widths), 8.2), 1.4 + 4.2 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False, width_ratios=widths).flat)
    for unused in panels[len(lengths) :]:
        unused.remove()
    return figure, panels[: len(lengths)]


def _draw_panel(panel: Any, rows: Sequence[Row], styles: Mapping[str, _Style]) -> None:
    lengths = sorted({row.tokens for row in rows})
    memory = panel.twinx()
    sizes = [row.cache_bytes for row in rows if row.cache_bytes]
    unit, unit_name = (2**30, "GiB") if max(sizes, default=0) >= 2**30 else (2**20, "MiB")
    longest = _longest_shown(rows)
    panel.set_ylim(0, 1.08 * longest / BARS)  # with space for the values above the bars
    width = GROUP / len(styles)
    for place, (name, style) in enumerate(styles.items()):
        of_cache = sorted((row for row in rows if row.cache == name), key=lambda row: row.tokens)
        shift = (place + 0.5) * width - GROUP / 2
        _draw_bars(panel, of_cache, [lengths.index(row.tokens) + shift for row in of_cache], width, style, longest)
        if style.has_line:
            held = [(lengths.index(row.tokens), row.cache_bytes / unit) for row in of_cache if row.cache_bytes]
            _draw_line(memory, held, style)
    for value in panel.texts:
        value.set_rotation(90 if len(lengths) * len(styles) > CROWDED else value.get_rotation())
    panel.set_xticks(range(len(lengths)), [f"{tokens:,}" for tokens in lengths])
    panel.set_xlim(-0.5, len(lengths) - 0.5)
    panel.set_xlabel("prompt tokens")
    panel.set_ylabel("time per token (ms)", loc="bottom")
    memory.set_ylabel(f"cache ({unit_name}, log)", loc="top")
    panel.locator_params(axis="y", nbins=10)
    panel.set_yticks([tick for tick in panel.get_yticks() if tick <= longest])
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    _limit_memory(memory, [size / unit for size in sizes] or [1.0])


def _longest_shown(rows: Sequence[Row]) -> float:
    """Where bars end: at the slowest run, or soon after that of all caches but one that leaves no space."""
    slowest: dict[str, float] = {}
    for row in rows:
        if row.slowest is not None:
            slowest[row.cache] = max(row.slowest, slowest.get(row.cache, 0.0))
    *others, first = sorted(slowest.values()) or [1.0]
    return 1.2 * others[-1] if len(others) > 1 and first > 2 * others[-1] else first


def _draw_bars(
    panel: Any, rows: Sequence[Row], places: Sequence[float], width: float, style: _Style, longest: float
) -> None:
    """One cache's bars with their values, broken at `longest`; where there is none stands why."""
    decoding = " / ".join(dict.fromkeys(row.decoding for row in rows))
    look = {"color": style.colour} if style.has_line else {"facecolor": style.colour, "edgecolor": "white"}
    for row, place in zip(rows, places, strict=True):
        if row.milliseconds is None or row.fastest is None or row.slowest is None:
            panel.text(place, 0, f"  {row.error}", rotation=90, ha="center", va="bottom", fontsize="small")
            continue
        height, top = min(row.milliseconds, longest), min(row.slowest, longest)
        hatch = None if style.has_line else "////"
        panel.bar(place, height, width, label=f"{row.cache} ({decoding})", linewidth=0, hatch=hatch, **look)
        if row.milliseconds > longest:
            _break_bar(panel, place, 0.93 * longest, width)
        else:
            spread = [[height - row.fastest], [top - height]]
            panel.errorbar(place, height, spread, ecolor="black", capsize=2)
        value = f"{row.milliseconds:.1f}" if row.milliseconds < 100 else f"{row.milliseconds:.0f}"
        offset = {"xytext": (0, 3), "textcoords": "offset points"}
        panel.annotate(value, (place, top), **offset, ha="center", va="bottom", fontsize="x-small")


def _break_bar(panel: Any, place: float, height: float, width: float) -> None:
    """A white, slanting gap."""
    edges = [place - 0.55 * width, place + 0.55 * width]
    slant, gap = 0.015 * height, 0.02 * height
    panel.fill_between(
        edges, [height - slant - gap, height + slant - gap], [height - slant + gap, height + slant + gap], color="white"
    )


def _draw_line(axis: Any, held: Sequence[tuple[int, float]], style: _Style) -> None:
    """One cache's memory, by place of the length."""
    # Thinner and smaller from cache to cache, as full caches of both kinds hold all but the same.
    axis.plot(
        [place for place, _ in held],
        [size for _, size in held],
        color=style.colour,
        marker=MARKERS[style.place % len(MARKERS)],
        markersize=max(10 - 4 * style.place, 6),
        linewidth=max(6 - 3.5 * style.place, 1.5),
    )


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
