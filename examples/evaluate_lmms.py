"""Evaluate Qwen2.5-VL-7B or LLaVA-1.6 on the six tasks of the MM-ShiftKV paper, at several budgets, with lmms-eval.

    python evaluate_lmms.py qwen2_5_vl
    python evaluate_lmms.py llava --methods full shiftkv snapkv --budgets 64 128 --processes 8 --output llava
    python evaluate_lmms.py qwen2_5_vl --limit 50 --dry-run

Needs `pip install "mmshiftkv[eval]"`. Each method and budget is one run of `python -m lmms_eval`, with several
processes one of `accelerate launch`, a GPU for each process; the command is printed first. lmms-eval writes results and
all answers below the output folder; a table of all runs, in percent, comes last. lmms-eval downloads the data with a
Hugging Face token (`hf auth login`), and computes TextCaps' CIDEr with Java.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    METHODS,
    budget,
    errors_in_one_line,
    existing_folder,
    fail,
    needs_checkpoint,
    needs_package,
    positive_integer,
    script_parser,
)

# lmms-eval's name of the model, and the default checkpoint
FAMILIES = {
    "qwen2_5_vl": ("qwen2_5_vl_shiftkv", "Qwen/Qwen2.5-VL-7B-Instruct"),
    "llava": ("llava_hf_shiftkv", "llava-hf/llava-v1.6-vicuna-7b-hf"),
}
# Of each task, the metric that goes into the table; other tasks show their first one.
TASKS = {
    "docvqa_val": "anls",
    "ocrbench": "ocrbench_accuracy",
    "textvqa_val": "exact_match",
    "chartqa": "relaxed_overall",
    "textcaps_val": "textcaps_CIDEr",
    "mmmu_val": "mmmu_acc",
}


@dataclass(frozen=True)
class Run:
    """One method at one budget; the full cache has none."""

    method: str
    budget: int | float | None = None

    @property
    def name(self) -> str:
        """A name for the run's folder."""
        return self.method if self.budget is None else f"{self.method}-{self.budget}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments; exits with a message when they are wrong."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("family", choices=FAMILIES, help="lmms-eval's class of models")
    add("--model", help="hub id or local folder (default: the 7B checkpoint of the paper)")
    add("--methods", nargs="+", choices=METHODS, default=["full", "shiftkv"], help="default: %(default)s")
    add(
        "--budgets",
        nargs="+",
        type=budget,
        default=[64, 128, 256, 512],
        help="prompt tokens to keep per layer and head, or the fraction of them in (0, 1] (default: %(default)s)",
    )
    add("--tasks", nargs="+", default=list(TASKS), help="names that lmms-eval knows (default: %(default)s)")
    add("--include-path", type=existing_folder, help="folder with more tasks")
    add("--limit", type=positive_integer, help="documents a task, to try it out (default: all)")
    add("--batch-size", type=positive_integer, default=1, help="lmms-eval's LLaVA takes 1 only (default: %(default)s)")
    add("--processes", type=positive_integer, default=1, help="GPUs, each with a copy of the model (default: 1)")
    add("--model-args", default="", help="more of lmms-eval's model_args, such as attn_implementation=sdpa,gamma=8")
    add("--output", type=Path, default=Path("evaluation"), help="folder for the results (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the commands only")
    arguments = parser.parse_args(argv)
    if arguments.batch_size > 1 and arguments.family == "llava":
        parser.error(f"--batch-size {arguments.batch_size}: lmms-eval's LLaVA takes 1 only")
    arguments.model = arguments.model or FAMILIES[arguments.family][1]
    return arguments


def runs(arguments: argparse.Namespace) -> list[Run]:
    """Each method at each budget, and the full cache once."""
    budgets = list(dict.fromkeys(arguments.budgets))
    found = []
    for method in dict.fromkeys(arguments.methods):
        found += [Run(method)] if method == "full" else [Run(method, number) for number in budgets]
    return found


def command(run: Run, arguments: argparse.Namespace) -> list[str]:
    """What evaluates one run."""
    name, _ = FAMILIES[arguments.family]
    model_args = [f"pretrained={arguments.model}", f"method={run.method}"]
    model_args += [] if run.budget is None else [f"budget={run.budget}"]
    model_args += [arguments.model_args] if arguments.model_args else []
    several = ["-m", "accelerate.commands.launch", f"--num_processes={arguments.processes}"]
    words = [sys.executable, *(several if arguments.processes > 1 else []), "-m", "lmms_eval"]
    words += ["--model", name, "--model_args", ",".join(model_args), "--tasks", ",".join(arguments.tasks)]
    words += ["--batch_size", str(arguments.batch_size), "--log_samples", "--output_path", str(folder(run, arguments))]
    words += ["--include_path", str(arguments.include_path)] if arguments.include_path else []
    words += ["--limit", str(arguments.limit)] if arguments.limit else []
    # Otherwise lmms-eval ends a process that failed with status 0, and the others wait for it.
    words += ["--verbosity", "DEBUG"] if arguments.processes > 1 else []
    return words


def check_gpus(processes: int) -> None:
    """Raises ValueError for more processes than GPUs: accelerate would start fewer, or they would have none."""
    import torch

    if 1 < processes > torch.cuda.device_count():
        raise ValueError(f"--processes {processes}: each needs a GPU, and there are {torch.cuda.device_count()}")


def folder(run: Run, arguments: argparse.Namespace) -> Path:
    """Where a run's results go."""
    path: Path = arguments.output / run.name
    return path


def evaluate(run: Run, arguments: argparse.Namespace) -> dict[str, float]:
    """Runs lmms-eval and reads what it wrote: the score of each task.

    Raises:
        RuntimeError: there is no new result.  lmms-eval ends with status 0 whatever happens.
    """
    results = folder(run, arguments)
    before = set(results.rglob("*_results.json"))
    status = subprocess.run(command(run, arguments), check=False).returncode
    new = sorted(set(results.rglob("*_results.json")) - before)
    if status or not new:
        raise RuntimeError(f"{run.name}: lmms-eval wrote no results (status {status}); its messages are above")
    written = json.loads(new[-1].read_text(encoding="utf-8"))["results"]
    return {task: score(task, written.get(task, {})) for task in arguments.tasks}


def score(task: str, metrics: dict[str, Any]) -> float:
    """The task's metric among those of lmms-eval, whose keys are "metric,filter"."""
    for key, value in metrics.items():
        metric, _, rest = key.partition(",")
        if rest and "_stderr" not in metric and metric == TASKS.get(task, metric) and isinstance(value, int | float):
            return float(value)
    raise RuntimeError(
        f"{task}: no number for {TASKS.get(task, 'any metric')} among its results: {', '.join(metrics) or 'none'}"
    )


def table(scores: dict[Run, dict[str, float]], tasks: Sequence[str]) -> str:
    """A Markdown table with a line for each run, in percent."""
    lines = [f"| method | budget | {' | '.join(tasks)} | mean |", "| --- " * (len(tasks) + 3) + "|"]
    for run, values in scores.items():
        cells = [*(values[task] for task in tasks), sum(values.values()) / len(values)]
        numbers = " | ".join(f"{100 * cell:.1f}" for cell in cells)
        lines.append(f"| {run.method} | {run.budget or '-'} | {numbers} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    if not arguments.dry_run:
        with errors_in_one_line():
            needs_package("lmms_eval", "eval")
            needs_package("decord", "eval")
            needs_checkpoint(arguments.model)
            check_gpus(arguments.processes)
    scores: dict[Run, dict[str, float]] = {}
    for run in runs(arguments):
        print(shlex.join(command(run, arguments)), flush=True)
        if not arguments.dry_run:
            try:
                scores[run] = evaluate(run, arguments)
            except RuntimeError as error:
                fail(error)
    if scores:
        print(table(scores, arguments.tasks))


if __name__ == "__main__":
    main()
