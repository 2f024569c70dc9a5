"""Measure what each setting of MM-ShiftKV is worth: a preset's settings, and the same with one thing changed.

    python examples/benchmarks/quality/variations.py --json development.json --note variations.md
    python examples/benchmarks/quality/variations.py --baseline value-aware --budgets 64 32 16 --json values.json
    python examples/benchmarks/quality/variations.py --seed 20240317 --only mass=0.5 gamma=5.0 --json test.json
    python examples/benchmarks/quality/variations.py --from development.json test.json --note variations.md

Every variation answers the same questions about generated documents, by default none of those that compare.py asks
about: settings are chosen on these, and only then looked at on the others (`--seed 20240317`). Exact match is averaged
over the tasks. Its difference to the preset's own settings is paired, question by question, with a 95 % bootstrap
interval. The JSON file has the settings, the versions and all figures, its scores being fractions 0..1; `--note` writes
one Markdown table from it, or with `--from` from files of earlier runs, in the order of the first of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.arguments import drop_repeats, need_packages
from common import choose_device, errors_in_one_line, output_file, script_parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, each budget, task and variation once; exits with a message when they are wrong."""
    need_packages(script_parser(__doc__), ("numpy", "PIL", "rapidfuzz", "tabulate", "tqdm"))
    from benchmarks.quality.questions import DEVELOPMENT_SEED, check_fonts, question_arguments
    from benchmarks.quality.variation import variations_of
    from benchmarks.quality.variations_report import PUBLISHED, TITLES, variations_file

    parser = script_parser(__doc__, question_arguments([64, 32], ["lookup", "multi", "line"], DEVELOPMENT_SEED))
    names = {baseline: [variation.name for variation in variations_of(baseline)] for baseline in TITLES}
    add = parser.add_argument
    add("--baseline", choices=tuple(TITLES), default=PUBLISHED, help="the preset to vary (default: %(default)s)")
    add(
        "--only",
        nargs="+",
        metavar="VARIATION",
        help="besides the preset itself (default: all): "
        + "; of ".join(f"{baseline!r} {', '.join(map(repr, found[1:]))}" for baseline, found in names.items()),
    )
    add("--note", type=output_file, help="write a Markdown table to this file")
    add(
        "--from",
        dest="runs",
        nargs="+",
        type=variations_file,
        metavar="JSON",
        help="measure nothing; --note of these files of --json together",
    )
    arguments = parser.parse_args(argv)
    for name in arguments.only or ():
        if name not in names[arguments.baseline]:
            choices = ", ".join(map(repr, names[arguments.baseline]))
            parser.error(f"--only: invalid choice: {name!r} (choose from {choices})")
    if arguments.runs and not arguments.note:
        parser.error("--from needs --note")
    if arguments.runs and arguments.json:
        parser.error("--json goes without --from")
    if not arguments.runs:
        check_fonts(parser, arguments)
    drop_repeats(arguments, "budgets", "tasks")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table, and writes the file of `--json`."""
    from benchmarks.quality.variation import variations_of
    from benchmarks.quality.variations_measurement import measure, summarized
    from benchmarks.quality.variations_report import record, table
    from tiny_vlm.answering import load
    from tiny_vlm.question_sets import check_tasks

    baseline, *others = variations_of(arguments.baseline)
    chosen = [baseline, *(one for one in others if arguments.only is None or one.name in arguments.only)]
    with errors_in_one_line():
        model, processor = load(arguments.model, arguments.device or choose_device("auto"), arguments.dtype)
        check_tasks(model, arguments.tasks)
        for variation in chosen:
            variation.make_cache(model, arguments.budgets[0])
    scores = measure(model, processor, chosen, arguments)
    results = [result for budget in arguments.budgets for result in summarized(scores, chosen, budget)]
    recorded = record(results, model, arguments)
    print(table(recorded))
    if arguments.json:
        report.write_record(arguments.json, recorded)
    return recorded


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    recorded = arguments.runs or [run(arguments)]
    if arguments.note:
        from benchmarks.quality.variations_report import note

        arguments.note.write_text(note(recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
