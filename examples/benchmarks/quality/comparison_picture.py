"""The picture that compare.py draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.quality.comparison import RECALL, Result
from benchmarks.quality.scoring import Estimate
from mmshiftkv.analysis.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASK_NAMES = {"lookup": "lookup", "multi": "multi-field", "line": "line", "cell": "table cell", "all": "whole page"}
FULL_CACHE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
PANEL = (3.8, 3.1)  # width and height in inches
LARGE_PANEL = (5.4, 4.2)  # for more methods than FEW
FEW = 8
APART = 0.075  # between the markers of two methods, in doublings of the budget
SPREAD = 0.7  # between the markers of the first and the last method, at most


@dataclass(frozen=True)
class Style:
    """How a method is drawn, in every panel alike."""

    name: str
    color: str
    marker: Any
    linewidth: float = 1.2
    markersize: float = 5
    dashes: Any = "-"

    @property
    def line(self) -> dict[str, Any]:
        """How its line is drawn."""
        return {"color": self.color, "linewidth": self.linewidth, "linestyle": self.dashes}

    @property
    def markers(self) -> dict[str, Any]:
        """How its markers are drawn: with an edge that parts those that touch."""
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
        return {"color": self.color, "marker": self.marker, "markersize": self.markersize, **edge}


COUNTS_VALUES = (0, (4, 1.5))
LOOKS_AHEAD = (0, (1, 1.2))
OTHER_SETTINGS = (0, (6, 1.5, 1, 1.5))
# The solid lines have Okabe and Ito's colours, which colour-blind readers can tell apart; the peers are dashed or
# dotted besides, and every method has a marker of its own.
STYLES = {
    "value-aware": Style("ShiftKV, value-aware", "#8E063B", "*", 2.6, 9),
    "shiftkv": Style("ShiftKV", "#D55E00", "o", 2.6, 6.5),
    "value-aware-qwen": Style("value-aware, Qwen settings", "#C77CFF", "H", 1.6, 7, OTHER_SETTINGS),
    "qwen-settings": Style("ShiftKV, Qwen settings", "#FF7F50", (4, 1, 0), 1.6, 7, OTHER_SETTINGS),
    "half-mass": Style("ShiftKV, mass 0.5", "#F4A582", "p", 1.6, 6.5),
    "expected_attention": Style("ExpectedAttention", "#009E73", "s"),
    "snapkv": Style("SnapKV", "#0072B2", "^", markersize=6),
    "snapkv_values": Style("SnapKV x values", "#56B4E9", "<", markersize=6, dashes=COUNTS_VALUES),
    "last_query_values": Style("last query x values", "#8A8A00", ">", markersize=6, dashes=COUNTS_VALUES),
    "criticalkv": Style("CriticalKV", "#332288", "P", markersize=6, dashes=COUNTS_VALUES),
    "dropkv": Style("DropKV", "#7B3F00", "h", markersize=6, dashes=COUNTS_VALUES),
    "kvzip": Style("KVzip (second pass)", "#66A61E", "d", markersize=6, dashes=LOOKS_AHEAD),
    "keydiff": Style("KeyDiff", "#CC79A7", "D", markersize=4.5),
    "streaming_llm": Style("StreamingLLM", "#E69F00", "v", markersize=6),
    "random": Style("Random", "#666666", "X", markersize=5.5),
    "full_attention": Style("full cache's attention (limit)", "black", "8", markersize=6, dashes=LOOKS_AHEAD),
}


def draw_plot(results: Sequence[Result]) -> "Figure":
    """Exact match against the budget, a panel for each task, and the recall; a line for each method, the full cache
    dashed, 95 % intervals shaded.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
    """
    full, compressed = results[0], results[1:]
    shown = [method for method in STYLES if method in {result.setup.method for result in compressed}]
    figure, panels, free_place = _empty_panels(len(full.tasks) + bool(full.recall), len(shown))
    for panel, task in zip(panels, full.tasks, strict=False):
        panel.axhline(100 * full.tasks[task].exact_match.mean, **FULL_CACHE)
        _draw_lines(panel, compressed, lambda result, task=task: result.tasks[task].exact_match)
        panel.set_title(TASK_NAMES.get(task, task))
        panel.set_ylabel("exact match (%)")
    if full.recall:
        panels[-1].axhline(100, **FULL_CACHE)
        _draw_lines(panels[-1], compressed, lambda result: result.mean()[RECALL])
        panels[-1].set_title("decode attention recall, all tasks")
        panels[-1].set_ylabel("recall (%)")
    for style in (STYLES[method] for method in shown):
        panels[0].plot([], [], **{**style.line, **style.markers}, label=style.name)
    panels[0].plot([], [], **FULL_CACHE, label="full cache")
    handles = panels[0].get_legend_handles_labels()
    if free_place:
        size = "large" if len(shown) <= FEW else "medium"
        free_place.legend(*handles, loc="center", frameon=False, fontsize=size, labelspacing=0.7, handlelength=3)
    else:
        columns = int(figure.get_figwidth() / (2 if len(shown) <= FEW else 2.6))
        figure.legend(*handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _empty_panels(count: int, methods: int) -> tuple["Figure", list[Any], Any]:
    """So many panels, at most three in a line, and what is left of the last line, if anything, for the legend."""
    columns = 2 if count == 4 else min(count, 3)
    lines = -(-count // columns)
    width, height = PANEL if methods <= FEW else LARGE_PANEL
    legend = 0.6 if methods <= FEW else 1.2
    figure = new_figure(0.2 + width * columns, (0 if count % columns else legend) + height * lines)
    grid = figure.add_gridspec(lines, columns)
    panels = [figure.add_subplot(grid[place // columns, place % columns]) for place in range(count)]
    for panel in panels:
        panel.set_ylim(-4, 104)
        panel.grid(alpha=0.3)
        panel.set_xlabel("budget (tokens per layer and KV head)")
    if not count % columns:
        return figure, panels, None
    free_place = figure.add_subplot(grid[-1, count % columns :])
    free_place.set_axis_off()
    return figure, panels, free_place


def _draw_lines(panel: Any, results: Sequence[Result], score: Callable[..., Estimate | float]) -> None:
    """A line for each method; `score` gives an Estimate, drawn with its interval, or a number.

    The methods' markers stand beside each other, so that those with the same score are all seen.
    """
    budgets = sorted({result.setup.budget or 0 for result in results})
    methods = sorted({result.setup.method for result in results}, key=[*STYLES].index)
    apart = min(APART, SPREAD / len(methods))
    for place, method in enumerate(methods):
        style = STYLES[method]
        of_method = sorted((r for r in results if r.setup.method == method), key=lambda r: r.setup.budget or 0)
        shift = 2 ** (apart * (place - (len(methods) - 1) / 2))
        places = [(result.setup.budget or 0) * shift for result in of_method]
        scores = [score(result) for result in of_method]
        means = [100 * (one.mean if isinstance(one, Estimate) else one) for one in scores]
        intervals = [one for one in scores if isinstance(one, Estimate)]
        if intervals:
            low, high = [100 * one.low for one in intervals], [100 * one.high for one in intervals]
            panel.fill_between(places, low, high, color=style.color, alpha=min(0.13, 0.8 / len(methods)), linewidth=0)
        panel.plot(places, means, **style.line, zorder=2.5 - place / 100)
        panel.plot(places, means, **style.markers, linestyle="none", zorder=3)
    panel.set_xscale("log", base=2)
    panel.set_xticks(budgets, [str(budget) for budget in budgets])
    panel.minorticks_off()
