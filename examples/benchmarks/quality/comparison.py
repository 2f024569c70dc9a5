"""What compare.py measures, and how it is shown: tables, JSON and a plot."""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Cache

from benchmarks.quality.scoring import Estimate, Summary
from mmshiftkv import make_cache

SNAPKV_WINDOW = 32
RECALL = "decode_attention_recall"
# How each method is drawn, in every plot alike.
LINES: dict[str, dict[str, Any]] = {
    "random": {"color": "gray", "linewidth": 1.2},
    "streaming_llm": {"color": "tab:olive", "linewidth": 1.2},
    "expected_attention": {"color": "tab:green", "linewidth": 1.2},
    "snapkv": {"color": "tab:blue", "linewidth": 1.2},
    "keydiff": {"color": "tab:purple", "linewidth": 1.2},
    "shiftkv": {"color": "tab:red", "linewidth": 2.4},
}


@dataclass(frozen=True)
class Setup:
    """One way to answer: a method at a budget, or the full cache, which has no budget."""

    method: str = "full"
    budget: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from the method's defaults: SnapKV's window is at most a quarter of the budget.

        Its tokens are always kept, so a window of 32 would leave little or nothing to select at the smallest budgets.
        """
        if self.method == "snapkv" and self.budget and self.budget < 4 * SNAPKV_WINDOW:
            return {"window": max(self.budget // 4, 1)}
        return {}

    def make_cache(self, model: Any) -> Cache:
        """A new cache for one `generate` call; raises ValueError for a budget that the method cannot keep."""
        return make_cache(self.method, model, self.budget, **self.settings)


@dataclass(frozen=True)
class Recall:
    """Decode attention recall: over all layers with its interval, and layer by layer."""

    mean: Estimate
    layers: list[float]


@dataclass(frozen=True)
class Result:
    """The scores of one setup, by task; a task whose answers have one token each has no recall."""

    setup: Setup
    tasks: dict[str, Summary]
    recall: dict[str, Recall] = field(default_factory=dict)

    def mean(self) -> dict[str, float]:
        """Exact match, ANLS and, if there is one, recall, averaged over the tasks."""
        means = {
            "exact_match": sum(task.exact_match.mean for task in self.tasks.values()) / len(self.tasks),
            "anls": sum(task.anls.mean for task in self.tasks.values()) / len(self.tasks),
        }
        if self.recall:
            means[RECALL] = sum(task.mean.mean for task in self.recall.values()) / len(self.recall)
        return means

    def recall_by_layer(self) -> list[float]:
        """Recall of each layer, averaged over the tasks."""
        by_task = [task.layers for task in self.recall.values()]
        return [sum(layer) / len(layer) for layer in zip(*by_task, strict=True)]


def _aligned(results: Sequence[Result], head: list[str], rows: Sequence[list[str]]) -> list[str]:
    """Lines of right-aligned cells behind each setup's name and budget, with space between budgets if methods vary."""
    cells = [["cache", "budget", *head]]
    for result, row in zip(results, rows, strict=True):
        cells.append([result.setup.method, str(result.setup.budget or "-"), *row])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    if len({result.setup.method for result in results} - {"full"}) > 1:
        for index in range(len(results) - 1, 0, -1):
            if results[index].setup.budget != results[index - 1].setup.budget:
                lines.insert(index + 1, "")
    return lines


def table(results: Sequence[Result]) -> str:
    """Scores in percent, one line a setup: each task's exact match and ANLS (with the number of questions), their mean
    over the tasks, and the decode attention recall."""
    tasks = results[0].tasks
    head = [*(f"{task} (n={tasks[task].count})" for task in tasks), "mean", "recall"]
    rows = []
    for result in results:
        mean = result.mean()
        scores = [(task.exact_match.mean, task.anls.mean) for task in result.tasks.values()]
        scores.append((mean["exact_match"], mean["anls"]))
        cells = [f"{100 * exact:.1f} / {100 * anls:.1f}" for exact, anls in scores]
        rows.append([*cells, f"{100 * mean[RECALL]:.1f}" if RECALL in mean else "-"])
    return "\n".join(["exact match / ANLS, percent", *_aligned(results, head, rows)])


def recall_table(results: Sequence[Result]) -> str:
    """Decode attention recall in percent, one line a setup: by task, and by layer (mean over the tasks)."""
    shown = [result for result in results if result.recall]
    if not shown:
        return ""
    layers = [f"layer {layer}" for layer in range(len(shown[0].recall_by_layer()))]
    head = [*shown[0].recall, *layers]
    rows = [
        [
            f"{100 * share:.1f}"
            for share in (*(task.mean.mean for task in result.recall.values()), *result.recall_by_layer())
        ]
        for result in shown
    ]
    return "\n".join(["decode attention recall, percent", *_aligned(shown, head, rows)])


def device_name(device: torch.device) -> str:
    """What the device is called, as far as its maker says."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def record(results: Sequence[Result], model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that a reader of the numbers needs to repeat them, ready for JSON."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "plot")}
    settings["model"] = arguments.model.resolve().name
    settings |= {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    return {
        "settings": settings,
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": device_name(model.device),
        },
        "results": [
            {
                "method": result.setup.method,
                "budget": result.setup.budget,
                "method_settings": result.setup.settings,
                "tasks": {task: _task_record(result, task) for task in result.tasks},
                "mean": result.mean(),
            }
            for result in results
        ],
    }


def _task_record(result: Result, task: str) -> dict[str, Any]:
    scores = asdict(result.tasks[task])
    if task in result.recall:
        recall = result.recall[task]
        scores[RECALL] = {**asdict(recall.mean), "layers": recall.layers}
    return scores


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
