"""Draw right answers against the share of the prompt that is kept, of several models, from records of compare.py.

    python examples/benchmarks/quality/share_of_prompt.py --plot share.png \\
        --read compare.json compare_values.json --read compare_llava.json

`--read` takes the records of one model. Exact match is averaged over the tasks that all models have. The share is the
budget in relation to the mean length of the prompts, which the models' processors count on the same questions.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.arguments import need_packages
from benchmarks.quality.compare import comparison_file
from common import ASSETS, errors_in_one_line, picture_file, script_parser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.quality.comparison import Result

DRAWN = ("value-aware", "shiftkv", "qwen-settings", "snapkv", "expected_attention")
PROMPTS_OF_TASK = 28  # whose lengths are counted: all page sizes equally often
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))


@dataclass(frozen=True)
class Curves:
    """One model: its name, the mean length of its prompts in tokens, the full cache's score, and points by method.

    A point is (share of the prompt, exact match), both in 0..1.
    """

    model: str
    tokens: float
    full: float
    methods: "dict[str, list[tuple[float, float]]]"


def prompt_length(folder: Path, tasks: Sequence[str], seed: int) -> float:
    """The mean number of prompt tokens over the first questions of each task."""
    from transformers import AutoConfig, AutoProcessor

    from tiny_vlm.answering import build_inputs
    from tiny_vlm.question_sets import questions_of

    processor = AutoProcessor.from_pretrained(folder)
    questions = questions_of(AutoConfig.from_pretrained(folder).model_type)
    lengths = [
        build_inputs(processor, [example.image], [example.question])["input_ids"].shape[1]
        for task in tasks
        for example in questions.held_out_of_task(task, PROMPTS_OF_TASK, seed)
    ]
    return sum(lengths) / len(lengths)


def exact(result: "Result", tasks: Sequence[str]) -> float:
    """Exact match, averaged over these tasks."""
    return sum(result.tasks[task].exact_match.mean for task in tasks) / len(tasks)


def curves_of(records: Sequence[dict[str, Any]], tasks: Sequence[str]) -> Curves:
    """The curves of one model's records."""
    from benchmarks.quality.comparison import joined

    settings = records[0]["settings"]
    tokens = prompt_length(ASSETS / settings["model"], tasks, settings["seed"])
    full, *results = joined(records)
    methods: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        if result.setup.method in DRAWN and result.setup.budget:
            point = result.setup.budget / tokens, exact(result, tasks)
            methods.setdefault(result.setup.method, []).append(point)
    return Curves(
        settings["model"], tokens, exact(full, tasks), {name: sorted(points) for name, points in methods.items()}
    )


def table(models: Sequence[Curves]) -> str:
    """One line for each point, in percent."""
    blocks = [
        [
            [one.model, method, f"{100 * share:.1f}", f"{100 * score:.1f}", f"{100 * score / one.full:.1f}"]
            for method in DRAWN
            for share, score in one.methods.get(method, [])
        ]
        for one in models
    ]
    return report.table(["model", "cache", "prompt kept", "exact match", "of the full cache's"], *blocks)


def draw(models: Sequence[Curves]) -> "Figure":
    """A panel with a line for each model and method."""
    from benchmarks.quality.comparison_picture import STYLES
    from mmshiftkv.analysis.figures import new_figure

    figure = new_figure(7.5, 4.6)
    panel = figure.add_subplot()
    for one, dashes in zip(models, DASHES, strict=False):
        panel.axhline(100 * one.full, color="black", linestyle=dashes, linewidth=1)
        for method in DRAWN:
            if points := one.methods.get(method):
                style = STYLES[method]
                panel.plot(
                    [100 * share for share, _ in points],
                    [100 * score for _, score in points],
                    **{**style.markers, **style.line, "linestyle": dashes},
                    label=f"{style.name}, {one.model} ({one.tokens:.0f} tokens)",
                )
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("share of the prompt that is kept (%)")
    panel.set_ylabel("exact match (%)")
    panel.set_ylim(-4, 104)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small", handlelength=4)
    return figure


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments; exits with a message when they are wrong."""
    need_packages(script_parser(__doc__), ("numpy", "PIL", "rapidfuzz", "tabulate", "tqdm"))
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--read", type=comparison_file, nargs="+", action="append", required=True, metavar="JSON", help="of one model")
    add("--plot", type=picture_file, required=True, help="draw into this file, such as .png")
    arguments = parser.parse_args(argv)
    if len(arguments.read) > len(DASHES):
        parser.error(f"--read: at most {len(DASHES)} models can be told apart")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    of_models = [records[0]["settings"]["tasks"] for records in arguments.read]
    common_tasks = [task for task in of_models[0] if all(task in tasks for tasks in of_models)]
    with errors_in_one_line():
        models = [curves_of(records, common_tasks) for records in arguments.read]
    print(table(models))
    draw(models).savefig(arguments.plot, dpi=150)


if __name__ == "__main__":
    main()
