"""The picture that compare.py draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.quality.comparison import RECALL, Result
from benchmarks.quality.scoring import Estimate
from mmshiftkv.analysis.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASK_NAMES = {"lookup": "lookup", "multi": "multi-field", "line": "line", "all": "whole page"}
FULL_CACHE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
PANEL = (3.8, 3.1)  # width and height in inches
APART = 0.075  # between the markers of two methods, in doublings of the budget


@dataclass(frozen=True)
class Style:
    """How a method is drawn, in every panel alike."""

    name: str
    color: str
    marker: str
    linewidth: float = 1.2
    markersize: float = 5

    @property
    def line(self) -> dict[str, Any]:
        """How its line is drawn."""
        return {"color": self.color, "linewidth": self.linewidth}

    @property
    def markers(self) -> dict[str, Any]:
        """How its markers are drawn: with an edge that parts those that touch."""
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
        return {"color": self.color, "marker": self.marker, "markersize": self.markersize, **edge}


# Okabe and Ito's colours, which colour-blind readers can tell apart.
STYLES = {
    "shiftkv": Style("ShiftKV", "#D55E00", "o", 2.6, 6.5),
    "expected_attention": Style("ExpectedAttention", "#009E73", "s"),
    "snapkv": Style("SnapKV", "#0072B2", "^", markersize=6),
    "keydiff": Style("KeyDiff", "#CC79A7", "D", markersize=4.5),
    "streaming_llm": Style("StreamingLLM", "#E69F00", "v", markersize=6),
    "random": Style("Random", "#666666", "X", markersize=5.5),
}


def draw_plot(results: Sequence[Result]) -> "Figure":
    """Exact match against the budget, a panel for each task, and the recall; a line for each method, the full cache
    dashed, 95 % intervals shaded.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
    """
    full, compressed = results[0], results[1:]
    figure, panels, free_place = _empty_panels(len(full.tasks) + bool(full.recall))
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
    for style in (STYLES[method] for method in STYLES if method in {result.setup.method for result in compressed}):
        panels[0].plot([], [], **{**style.line, **style.markers}, label=style.name)
    panels[0].plot([], [], **FULL_CACHE, label="full cache")
    handles = panels[0].get_legend_handles_labels()
    if free_place:
        free_place.legend(*handles, loc="center", frameon=False, fontsize="large", labelspacing=0.7, handlelength=3)
    else:
        figure.legend(*handles, loc="outside upper center", ncols=int(figure.get_figwidth() / 2), frameon=False)
    return figure


def _empty_panels(count: int) -> tuple["Figure", list[Any], Any]:
    """So many panels, at most three in a line, and what is left of the last line, if anything, for the legend."""
    columns = 2 if count == 4 else min(count, 3)
    lines = -(-count // columns)
    width, height = PANEL
    figure = new_figure(0.2 + width * columns, (0 if count % columns else 0.6) + height * lines)
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
    for place, method in enumerate(methods):
        style = STYLES[method]
        of_method = sorted((r for r in results if r.setup.method == method), key=lambda r: r.setup.budget or 0)
        shift = 2 ** (APART * (place - (len(methods) - 1) / 2))
        places = [(result.setup.budget or 0) * shift for result in of_method]
        scores = [score(result) for result in of_method]
        means = [100 * (one.mean if isinstance(one, Estimate) else one) for one in scores]
        intervals = [one for one in scores if isinstance(one, Estimate)]
        if intervals:
            low, high = [100 * one.low for one in intervals], [100 * one.high for one in intervals]
            panel.fill_between(places, low, high, color=style.color, alpha=0.13, linewidth=0)
        panel.plot(places, means, **style.line, zorder=2.5 - place / 100)
        panel.plot(places, means, **style.markers, linestyle="none", zorder=3)
    panel.set_xscale("log", base=2)
    panel.set_xticks(budgets, [str(budget) for budget in budgets])
    panel.minorticks_off()
