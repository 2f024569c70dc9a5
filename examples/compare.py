"""Measure how many answers about held-out documents stay right when the KV cache is compressed.

    python compare.py --count 100 --budgets 128 64 32 16 --json compare.json --plot compare.png

Every task gets the same held-out questions with the full cache and with each method at each budget. The table gives
exact match (case and white space count) and ANLS (the measure of DocVQA) in percent; the JSON file adds 95 % bootstrap
intervals, the settings and the versions, its scores being fractions 0..1. Without `--model` the small Qwen2.5-VL next
to this file answers: it reads such pages, and no other documents.
"""

import argparse
import importlib.util
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import Cache, DynamicCache

from common import DTYPES, positive_integer
from mmshiftkv import ShiftKVCache
from scoring import Summary, summarize
from tiny_vlm.answering import MAX_NEW_TOKENS, answer, build_inputs, existing_folder, load
from tiny_vlm.pages import ALL_FONTS, BUILTIN_FONTS, HELD_OUT_SEED, TASKS, Example, held_out_of_task

DEFAULT_MODEL = Path(__file__).resolve().parent / "assets" / "tiny_qwen2_5_vl"
NEED_MATPLOTLIB = 'needs matplotlib: pip install "mmshiftkv[plot]"'

# A method makes the cache for one `generate` call from the model and the budget, tokens per layer and KV head.
METHODS: dict[str, Callable[[Any, int], Cache]] = {
    "shiftkv": lambda model, budget: ShiftKVCache(model, budget=budget),
}


@dataclass(frozen=True)
class Setup:
    """One way to answer: a method of METHODS at a budget, or the full cache, which has neither."""

    method: str | None = None
    budget: int | None = None

    @property
    def name(self) -> str:
        """The method's name, "full" for the full cache."""
        return self.method or "full"

    def make_cache(self, model: Any) -> Cache:
        """A new cache for one `generate` call."""
        if self.method is None or self.budget is None:
            return DynamicCache(config=model.config)
        return METHODS[self.method](model, self.budget)


@dataclass(frozen=True)
class Result:
    """The scores of one setup, by task."""

    setup: Setup
    tasks: dict[str, Summary]

    def mean(self) -> dict[str, float]:
        """Exact match and ANLS averaged over the tasks."""
        return {
            "exact_match": sum(task.exact_match.mean for task in self.tasks.values()) / len(self.tasks),
            "anls": sum(task.anls.mean for task in self.tasks.values()) / len(self.tasks),
        }


def batches(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    """Lists of `size` examples; the last one may be shorter."""
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def measure(model: Any, processor: Any, setups: Sequence[Setup], arguments: argparse.Namespace) -> list[Result]:
    """Answers the same questions with every setup; a batch holds one task, as answers differ in length by task."""
    fonts = BUILTIN_FONTS if arguments.builtin_font_only else ALL_FONTS
    pairs: dict[Setup, dict[str, list[tuple[str, str]]]] = {
        setup: {task: [] for task in arguments.tasks} for setup in setups
    }
    total = len(arguments.tasks) * arguments.count * len(setups)
    with tqdm(total=total, unit="answer") as progress:
        for task in arguments.tasks:
            examples = held_out_of_task(task, arguments.count, arguments.seed, fonts)
            for batch in batches(examples, arguments.batch_size):
                images, questions = [example.image for example in batch], [example.question for example in batch]
                inputs = build_inputs(processor, images, questions)
                for setup in setups:
                    progress.set_description(f"{task}, {setup.name} {setup.budget or ''}".rstrip())
                    found = answer(model, processor, inputs, setup.make_cache(model), MAX_NEW_TOKENS[task])
                    truths = (example.answer for example in batch)
                    pairs[setup][task].extend(zip(found, truths, strict=True))
                    progress.update(len(batch))
    return [
        Result(setup, {task: summarize(answers) for task, answers in by_task.items()})
        for setup, by_task in pairs.items()
    ]


def table(results: Sequence[Result]) -> str:
    """One line a setup, in percent: exact match and ANLS of each task (with the number of questions) and their mean."""
    tasks = results[0].tasks
    cells = [["cache", "budget", *(f"{task} (n={tasks[task].count})" for task in tasks), "mean"]]
    for result in results:
        scores = [(task.exact_match.mean, task.anls.mean) for task in result.tasks.values()]
        mean = result.mean()
        scores.append((mean["exact_match"], mean["anls"]))
        budget = "-" if result.setup.budget is None else str(result.setup.budget)
        cells.append([result.setup.name, budget, *(f"{100 * exact:.1f} / {100 * anls:.1f}" for exact, anls in scores)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(["exact match / ANLS, percent", *lines])


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
                "method": result.setup.name,
                "budget": result.setup.budget,
                "tasks": {task: asdict(summary) for task, summary in result.tasks.items()},
                "mean": result.mean(),
            }
            for result in results
        ],
    }


def draw_plot(results: Sequence[Result], path: Path) -> None:
    """Exact match against the budget, a panel for each method and a line for each task; the full cache is dashed."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    full, compressed = results[0], results[1:]
    methods = list(dict.fromkeys(result.setup.name for result in compressed))
    figure = Figure(figsize=(1 + 4.5 * len(methods), 3.8), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for panel, method in zip(panels, methods, strict=True):
        rows = sorted(
            ((result.setup.budget or 0, result.tasks) for result in compressed if result.setup.name == method),
            key=lambda row: row[0],
        )
        budgets = [budget for budget, _ in rows]
        for task, summary in full.tasks.items():
            exact = [tasks[task].exact_match for _, tasks in rows]
            (line,) = panel.plot(budgets, [100 * one.mean for one in exact], marker="o", label=task)
            low, high = [100 * one.low for one in exact], [100 * one.high for one in exact]
            panel.fill_between(budgets, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
            panel.axhline(100 * summary.exact_match.mean, color=line.get_color(), linestyle="--", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, [str(budget) for budget in budgets])
        panel.set(title=method, xlabel="budget (tokens per layer and KV head)", ylim=(-3, 103))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("exact match (%)")
    panels[-1].plot([], [], color="gray", linestyle="--", linewidth=1, label="full cache")
    panels[-1].legend(loc="best")
    figure.savefig(path, dpi=150)


def choose_device(text: str) -> torch.device:
    """An argparse type: a torch device that is there; "auto" is the GPU if there is one, else the CPU."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from error
    return device


def output_file(text: str) -> Path:
    """An argparse type: the path of a file to write, in a folder that exists."""
    path = Path(text)
    existing_folder(str(path.parent))
    return path


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, each method, budget and task once; exits with a message when they are wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=existing_folder, default=DEFAULT_MODEL, help="folder of the model and its processor")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="ways to compress the cache")
    add("--budgets", nargs="+", type=positive_integer, default=[128, 64, 32, 16], help="tokens per layer and KV head")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="kinds of questions")
    add("--count", type=positive_integer, default=100, help="questions of each task")
    add("--batch-size", type=positive_integer, default=8, help="questions answered together")
    add("--seed", type=int, default=HELD_OUT_SEED, help="of the pages and questions")
    add("--builtin-font-only", action="store_true", help="draw the pages without the fonts that come with matplotlib")
    add("--device", type=choose_device, default="auto", help="where to run")
    add("--dtype", choices=DTYPES, default="float32", help="of the model; auto: that of the checkpoint")
    add("--json", type=output_file, help="write settings, versions and scores to this file")
    add("--plot", type=output_file, help="draw exact match against the budget into this file (.png, .svg or .pdf)")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        if arguments.plot:
            parser.error(f"--plot {NEED_MATPLOTLIB}")
        if not arguments.builtin_font_only:
            parser.error(f"drawing the pages without --builtin-font-only {NEED_MATPLOTLIB}")
    for name in ("methods", "budgets", "tasks"):
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    model, processor = load(arguments.model, arguments.device, arguments.dtype)
    setups = [Setup()] + [Setup(method, budget) for method in arguments.methods for budget in arguments.budgets]
    results = measure(model, processor, setups, arguments)
    print(table(results))
    if arguments.json:
        text = json.dumps(record(results, model, arguments), indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        draw_plot(results, arguments.plot)


if __name__ == "__main__":
    main()
