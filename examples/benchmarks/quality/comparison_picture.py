"""The picture that compare.py draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.comparison import RECALL, Result
from benchmarks.quality.scoring import Estimate

# How each method is drawn, in every plot alike.
LINES: dict[str, dict[str, Any]] = {
    "random": {"color": "gray", "linewidth": 1.2},
    "streaming_llm": {"color": "tab:olive", "linewidth": 1.2},
    "expected_attention": {"color": "tab:green", "linewidth": 1.2},
    "snapkv": {"color": "tab:blue", "linewidth": 1.2},
    "keydiff": {"color": "tab:purple", "linewidth": 1.2},
    "shiftkv": {"color": "tab:red", "linewidth": 2.4},
}


def draw_plot(results: Sequence[Result], path: Path) -> None:
    """Exact match against the budget, a panel for each task, and the recall; a line for each method, the full cache
    dashed, 95 % intervals shaded."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    full, compressed = results[0], results[1:]
    tasks = list(full.tasks)
    panels = len(tasks) + bool(full.recall)
    columns = 2 if panels == 4 else min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(0.6 + 3.8 * columns, 0.7 + 3.1 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    for panel, task in zip(axes, tasks, strict=False):
        panel.axhline(100 * full.tasks[task].exact_match.mean, color="black", linestyle="--", linewidth=1)
        _draw_lines(panel, compressed, lambda result, task=task: result.tasks[task].exact_match)
        panel.set_title(task)
    if full.recall:
        axes[panels - 1].axhline(100, color="black", linestyle="--", linewidth=1)
        _draw_lines(axes[panels - 1], compressed, lambda result: result.mean()[RECALL])
        axes[panels - 1].set_title("all tasks")
        axes[panels - 1].set_ylabel("decode attention recall (%)")
    for panel in axes[:panels]:
        panel.set_ylim(-3, 103)
        panel.grid(alpha=0.3)
        panel.set_xlabel("budget (tokens per layer and KV head)")
    for panel in axes[: len(tasks) : columns]:
        panel.set_ylabel("exact match (%)")
    axes[0].plot([], [], color="black", linestyle="--", linewidth=1, label="full cache")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=7)
    figure.savefig(path, dpi=150)


def _draw_lines(panel: Any, results: Sequence[Result], score: Any) -> None:
    """A line for each method; `score` gives an Estimate, drawn with its interval, or a number."""
    budgets = sorted({result.setup.budget or 0 for result in results})
    for method in dict.fromkeys(result.setup.method for result in results):
        of_method = sorted((r for r in results if r.setup.method == method), key=lambda r: r.setup.budget or 0)
        places = [result.setup.budget or 0 for result in of_method]
        scores = [score(result) for result in of_method]
        means = [100 * (one.mean if isinstance(one, Estimate) else one) for one in scores]
        (line,) = panel.plot(places, means, label=method, **LINES.get(method, {}), marker="o", markersize=4)
        if isinstance(scores[0], Estimate):
            low, high = [100 * one.low for one in scores], [100 * one.high for one in scores]
            panel.fill_between(places, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(budgets, [str(budget) for budget in budgets])
    panel.minorticks_off()
