"""Measure how many answers about held-out documents stay right when the KV cache is compressed, method by method.

    python compare.py --count 100 --budgets 128 64 32 16 --json compare.json --plot compare.png

Every task gets the same held-out questions with the full cache and with each method at each budget. The first table
gives exact match (case and white space count) and ANLS (the measure of DocVQA) in percent, the second the decode
attention recall of each layer (see recall.py); the JSON file adds 95 % bootstrap intervals, the settings and the
versions, its scores being fractions 0..1. Without `--model` the small Qwen2.5-VL next to this file answers: it reads
such pages, and no other documents.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mmshiftkv
from benchmarks.quality.comparison import Setup, recall_table, record, table
from benchmarks.quality.comparison_measurement import measure
from benchmarks.quality.comparison_picture import draw_plot
from common import DTYPES, TINY_MODEL, choose_device, positive_integer
from tiny_vlm.answering import existing_folder, load
from tiny_vlm.pages import HELD_OUT_SEED, TASKS

# In the order of the paper's tables; the full cache is always measured.
METHODS = [*(method for method in mmshiftkv.METHODS if method not in ("full", "shiftkv")), "shiftkv"]
NEED_MATPLOTLIB = 'needs matplotlib: pip install "mmshiftkv[plot]"'


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
    add("--model", type=existing_folder, default=TINY_MODEL, help="folder of the model and its processor")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="ways to compress the cache")
    add("--budgets", nargs="+", type=positive_integer, default=[128, 64, 32, 16], help="tokens per layer and KV head")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="kinds of questions")
    add("--count", type=positive_integer, default=100, help="questions of each task")
    add("--batch-size", type=positive_integer, default=8, help="questions answered together")
    add("--seed", type=int, default=HELD_OUT_SEED, help="of the pages and questions")
    add("--builtin-font-only", action="store_true", help="draw the pages without the fonts that come with matplotlib")
    add("--device", type=choose_device, default="auto", help="where to run")
    add("--dtype", choices=DTYPES, default="float32", help="of the model; auto: that of the checkpoint")
    add("--json", type=output_file, help="write settings, versions and scores to this file")
    add(
        "--plot",
        type=output_file,
        help="draw exact match and recall against the budget into this file (.png, .svg or .pdf)",
    )
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
    setups = [Setup()] + [Setup(method, budget) for budget in arguments.budgets for method in arguments.methods]
    for setup in setups:
        try:
            setup.make_cache(model)
        except ValueError as error:
            sys.exit(f"compare.py: error: {setup.method}: {error}")
    results = measure(model, processor, setups, arguments)
    print(table(results), recall_table(results), sep="\n\n")
    if arguments.json:
        text = json.dumps(record(results, model, arguments), indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        draw_plot(results, arguments.plot)


if __name__ == "__main__":
    main()
