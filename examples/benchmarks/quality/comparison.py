"""What compare.py measures, and how it is shown: tables and JSON."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.quality.peers import PEERS, Prompts, make_peer
from benchmarks.quality.scoring import Estimate, Summary

if TYPE_CHECKING:
    from transformers import Cache

SNAPKV_WINDOW = 32
WITH_WINDOW = ("snapkv", "snapkv_values", "criticalkv", "dropkv")
RECALL = "decode_attention_recall"


@dataclass(frozen=True)
class Compared:
    """What a compared name stands for: a method of the library, or a peer, with settings."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)


# The settings published for Qwen2.5-VL, for models of a family with others.
QWEN_SETTINGS: dict[str, Any] = {"num_groups": 32, "stats_window": None, "last_token_layers": 0}

# In the order in which they are shown: that of the paper's tables, the peers behind SnapKV, which most of them build
# on, and the limit last.
COMPARED = {
    "random": Compared("random"),
    "streaming_llm": Compared("streaming_llm"),
    "expected_attention": Compared("expected_attention"),
    "snapkv": Compared("snapkv"),
    **{peer: Compared(peer) for peer in PEERS if peer != "full_attention"},
    "keydiff": Compared("keydiff"),
    "shiftkv": Compared("shiftkv"),
    "half-mass": Compared("shiftkv", {"mass": 0.5}),
    "qwen-settings": Compared("shiftkv", QWEN_SETTINGS),
    "value-aware": Compared("shiftkv", {"preset": "value-aware"}),
    "value-aware-qwen": Compared("shiftkv", {"preset": "value-aware", **QWEN_SETTINGS}),
    "full_attention": Compared("full_attention"),
}
OTHER_FAMILY = ("qwen-settings", "value-aware-qwen")
# The others are measured when they are named.
ALL = [name for name in COMPARED if name not in OTHER_FAMILY]
USUAL = [name for name in ALL if name not in PEERS and name != "half-mass"]


@dataclass(frozen=True)
class Setup:
    """One way to answer: one of COMPARED at a budget, or the full cache, which has no budget."""

    method: str = "full"
    budget: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from the method's defaults: a window like SnapKV's is at most a quarter of the budget.

        Its tokens are always kept, so a window of 32 would leave little or nothing to select at the smallest budgets.
        """
        if self.method == "full":
            return {}
        settings = COMPARED[self.method].settings
        if self.method in WITH_WINDOW and self.budget and self.budget < 4 * SNAPKV_WINDOW:
            return {**settings, "window": max(self.budget // 4, 1)}
        return settings

    def make_cache(self, model: Any, prompts: Prompts | None = None) -> "Cache":
        """A new cache for one `generate` call; raises ValueError for a budget that the method cannot keep.

        Without the prompts that it will get, some peers' caches only show whether the budget is allowed.
        """
        from mmshiftkv import make_cache

        method = self.method if self.method == "full" else COMPARED[self.method].method
        if method in PEERS:
            assert self.budget is not None
            return make_peer(method, model, self.budget, prompts, **self.settings)
        return make_cache(method, model, self.budget, **self.settings)

    def document_options(self) -> dict[str, Any]:
        """What `mmshiftkv.Document` takes to compress a page so."""
        if self.method == "full":
            return {"budget": 1.0}
        method = COMPARED[self.method].method
        return {"budget": self.budget, "method": method, "cache_settings": self.settings}


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


def _blocks(results: Sequence[Result], rows: Sequence[list[str]]) -> Iterator[list[list[str]]]:
    """Rows of cells behind each setup's name and budget, in blocks: of each budget, if methods vary."""
    methods = {result.setup.method for result in results} - {"full"}
    by_budget = groupby(
        zip(results, rows, strict=True), key=lambda pair: pair[0].setup.budget if len(methods) > 1 else None
    )
    for _, pairs in by_budget:
        yield [[result.setup.method, str(result.setup.budget or "-"), *row] for result, row in pairs]


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
    lines = report.table(["cache", "budget", *head], *_blocks(results, rows))
    return f"exact match / ANLS, percent\n{lines}"


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
    lines = report.table(["cache", "budget", *head], *_blocks(shown, rows))
    return f"decode attention recall, percent\n{lines}"


def record(results: Sequence[Result], model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that a reader of the numbers needs to repeat them, ready for JSON."""
    names = ("methods", "budgets", "tasks", "count", "batch_size", "seed", "builtin_font_only", "document_first")
    return {
        "settings": {
            "model": arguments.model.resolve().name,
            **{name: getattr(arguments, name) for name in names},
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "environment": report.environment(model.device),
        "results": [result_record(result) for result in results],
    }


def result_record(result: Result) -> dict[str, Any]:
    """One setup's scores, ready for JSON."""
    return {
        "method": result.setup.method,
        "budget": result.setup.budget,
        "method_settings": result.setup.settings,
        "tasks": {task: _task_record(result, task) for task in result.tasks},
        "mean": result.mean(),
    }


def _task_record(result: Result, task: str) -> dict[str, Any]:
    scores = asdict(result.tasks[task])
    if task in result.recall:
        recall = result.recall[task]
        scores[RECALL] = {**asdict(recall.mean), "layers": recall.layers}
    return scores


def read(record: dict[str, Any]) -> list[Result]:
    """The results in what `record` made: `result_record` makes the same of them again.

    Raises:
        LookupError, TypeError: it is something else.
    """
    return [_read_result(result) for result in record["results"]]


def joined(records: Sequence[dict[str, Any]]) -> list[Result]:
    """The results of several records of `record`, by budget and in the order of COMPARED.

    A setup that several have is that of the first of them.

    Raises:
        ValueError: they are not about the same questions.
    """
    for name in ("tasks", "count", "seed", "builtin_font_only", "model", "document_first"):
        # Records from before there was a choice had the question in the prompt.
        first, *others = (one["settings"].get(name, False) for one in records)
        for other in others:
            if other != first:
                raise ValueError(
                    f"--read: the files are not about the same questions: {name} is {first!r} and {other!r}"
                )
    found: dict[Setup, Result] = {}
    for one in records:
        for result in read(one):
            found.setdefault(result.setup, result)
    budgets = list(dict.fromkeys(setup.budget for setup in found))
    names = ["full", *COMPARED]
    return sorted(found.values(), key=lambda one: (budgets.index(one.setup.budget), names.index(one.setup.method)))


def _read_result(result: dict[str, Any]) -> Result:
    tasks, recalls = {}, {}
    for task, scores in result["tasks"].items():
        tasks[task] = Summary(scores["count"], Estimate(**scores["exact_match"]), Estimate(**scores["anls"]))
        if RECALL in scores:
            mean = {name: value for name, value in scores[RECALL].items() if name != "layers"}
            recalls[task] = Recall(Estimate(**mean), scores[RECALL]["layers"])
    return Result(Setup(result["method"], result["budget"]), tasks, recalls)
