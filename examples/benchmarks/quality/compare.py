"""Measure how many answers about held-out documents stay right when the KV cache is compressed, method by method.

    python examples/benchmarks/quality/compare.py --count 100 --json compare.json --plot compare.png
    python examples/benchmarks/quality/compare.py --methods shiftkv snapkv --budgets 64 --tasks lookup
    python examples/benchmarks/quality/compare.py --methods all --budgets 64 32
    python examples/benchmarks/quality/compare.py --document-first --count 140 --budgets 128 64
    python examples/benchmarks/quality/compare.py --read compare.json peers.json --plot compare.png

Every task gets the same held-out questions with the full cache and with each method at each budget. The first table
gives exact match (case and white space count) and ANLS (the measure of DocVQA) in percent, the second the decode
attention recall of each layer: how much of what the full cache's own answer looks at while it is decoded is among the
tokens that are kept. `--methods all` has those of the folder peers besides, which count values or look ahead, and
ShiftKV's presets; "full_attention" is a limit, as it knows the answer. The JSON file adds 95 % bootstrap intervals, the
settings and the versions, its scores being fractions 0..1. With `--document-first` the page is compressed before the
question is known, as `mmshiftkv.Document` does it. Without `--model` the small Qwen2.5-VL of this repository answers:
it reads such pages, and no other documents. With `--model` the small LLaVA-NeXT answers about its own pages:

    python examples/benchmarks/quality/compare.py --model examples/assets/tiny_llava_next --budgets 512 256 128 64 \\
        --methods shiftkv qwen-settings value-aware value-aware-qwen snapkv expected_attention

There "qwen-settings" and "value-aware-qwen" are ShiftKV and its preset with the settings published for Qwen2.5-VL, in
place of those of the model's own family; `--methods all` leaves them out.

Several processes, a GPU for each, take whole batches in turn; the tables and the file are those of one:

    accelerate launch --num_processes 2 examples/benchmarks/quality/compare.py --count 100 --json compare.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.arguments import drop_repeats, need_packages
from benchmarks.processes import Processes, launched
from common import choose_device, errors_in_one_line, fail, picture_file, script_parser

if TYPE_CHECKING:
    from benchmarks.quality.comparison import Result


def comparison_file(text: str) -> dict[str, Any]:
    """An argparse type: what compare.py has written as JSON, by the path of the file."""
    from benchmarks.quality.comparison import read

    return report.read_record(text, "compare.py", read)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, each method, budget and task once; exits with a message when they are wrong."""
    need_packages(script_parser(__doc__), ("numpy", "PIL", "rapidfuzz", "tabulate", "tqdm"))
    from benchmarks.quality.comparison import ALL, COMPARED, USUAL
    from benchmarks.quality.peers import PEERS
    from benchmarks.quality.questions import check_fonts, question_arguments
    from tiny_vlm.pages import HELD_OUT_SEED, TASKS

    parser = script_parser(__doc__, question_arguments([128, 64, 32, 16], TASKS, HELD_OUT_SEED))
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        choices=[*COMPARED, "all"],
        default=USUAL,
        help=f"to compress with; the full cache is always measured (default: {' '.join(USUAL)})",
    )
    add(
        "--document-first",
        action="store_true",
        help="compress the page before the question is known; without recall, and without the peers",
    )
    add("--plot", type=picture_file, help="draw exact match and recall against the budget into this file, such as .png")
    add(
        "--read",
        type=comparison_file,
        nargs="+",
        metavar="JSON",
        help="measure nothing; show these files of --json together, each method as the first of them has it",
    )
    arguments = parser.parse_args(argv)
    if arguments.read and arguments.json:
        parser.error("--json goes without --read")
    if not arguments.read:
        check_fonts(parser, arguments)
    if "all" in arguments.methods:
        arguments.methods = ALL
    drop_repeats(arguments, "methods", "budgets", "tasks")
    peers = [method for method in arguments.methods if method in PEERS]
    if arguments.document_first and peers:
        parser.error(f"--document-first: not for {', '.join(peers)}, which look at more than a page")
    return arguments


def run(arguments: argparse.Namespace, processes: Processes) -> "list[Result]":
    """Measures, together with the other processes; the main one writes the file of `--json`."""
    from benchmarks.quality.comparison import Setup, record
    from benchmarks.quality.comparison_measurement import measure
    from tiny_vlm.answering import load
    from tiny_vlm.question_sets import check_tasks

    with errors_in_one_line():
        model, processor = load(arguments.model, arguments.device, arguments.dtype)
        check_tasks(model, arguments.tasks)
    setups = [Setup()] + [Setup(method, budget) for budget in arguments.budgets for method in arguments.methods]
    for setup in setups:
        try:
            setup.make_cache(model)
        except (TypeError, ValueError) as error:  # a budget that the method cannot keep, a model that it does not know
            fail(f"{setup.method}: {error}")
    results = measure(model, processor, setups, arguments, processes)
    if arguments.json and processes.is_main:
        report.write_record(arguments.json, record(results, model, arguments))
    return results


def show(results: "list[Result]", plot: Path | None) -> None:
    """Prints the tables, and draws the picture if it is asked for."""
    from benchmarks.quality.comparison import recall_table, table
    from benchmarks.quality.comparison_picture import draw_plot

    print(table(results), recall_table(results), sep="\n\n")
    if plot:
        draw_plot(results).savefig(plot, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    from benchmarks.quality.comparison import joined

    if arguments.read:
        with errors_in_one_line():
            results = joined(arguments.read)
        show(results, arguments.plot)
        return
    arguments.device = arguments.device or choose_device("auto")
    with errors_in_one_line(), launched(arguments.device) as processes:
        results = run(arguments, processes)
        if processes.is_main:
            show(results, arguments.plot)


if __name__ == "__main__":
    main()
