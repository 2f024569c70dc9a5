"""Measure what each setting of MM-ShiftKV is worth: the published settings, and the same with one thing changed.

    python variations.py --json development.json --note variations.md
    python variations.py --seed 20240317 --json test.json
    python variations.py --from development.json test.json --note variations.md

Every variation answers the same questions about generated documents, by default none of those that compare.py asks
about: settings are chosen on these, and only then looked at on the others (`--seed 20240317`). Exact match is averaged
over the tasks. Its difference to the published settings is paired, question by question, with a 95 % bootstrap
interval. The JSON file has the settings, the versions and all figures, its scores being fractions 0..1; `--note` writes
one Markdown table from it, or with `--from` from files of earlier runs, in the order of the first of them.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.quality.compare import NEED_MATPLOTLIB
from benchmarks.quality.variation import all_variations
from benchmarks.quality.variations_measurement import measure, summarized
from benchmarks.quality.variations_report import PUBLISHED, note, read_run, record, table
from common import DTYPES, TINY_MODEL, choose_device, output_file, positive_integer
from tiny_vlm.answering import existing_folder, load
from tiny_vlm.pages import HELD_OUT_SEED, TASKS

DEVELOPMENT_SEED = HELD_OUT_SEED + 2  # calibrate.py has the one between


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, each budget, task and variation once; exits with a message when they are wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [variation.name for variation in all_variations()]
    add = parser.add_argument
    add("--model", type=existing_folder, default=TINY_MODEL, help="folder of the model and its processor")
    add("--only", nargs="+", choices=names, default=names, metavar="VARIATION", help=f"besides {PUBLISHED!r}")
    add("--budgets", nargs="+", type=positive_integer, default=[64, 32], help="tokens per layer and KV head")
    add("--tasks", nargs="+", choices=TASKS, default=["lookup", "multi", "line"], help="kinds of questions")
    add("--count", type=positive_integer, default=100, help="questions of each task")
    add("--batch-size", type=positive_integer, default=8, help="questions answered together")
    add("--seed", type=int, default=DEVELOPMENT_SEED, help=f"of the pages and questions; test set: {HELD_OUT_SEED}")
    add("--builtin-font-only", action="store_true", help="draw the pages without the fonts that come with matplotlib")
    add("--device", type=choose_device, default="auto", help="where to run")
    add("--dtype", choices=DTYPES, default="float32", help="of the model; auto: that of the checkpoint")
    add("--json", type=output_file, help="write settings, versions and scores to this file")
    add("--note", type=output_file, help="write a Markdown table to this file")
    add("--from", dest="runs", nargs="+", type=read_run, help="for --note: JSON files, instead of a run")
    arguments = parser.parse_args(argv)
    if arguments.runs and not arguments.note:
        parser.error("--from needs --note")
    if not (arguments.runs or arguments.builtin_font_only) and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"drawing the pages without --builtin-font-only {NEED_MATPLOTLIB}")
    for name in ("budgets", "tasks"):
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    recorded = arguments.runs
    if not recorded:
        model, processor = load(arguments.model, arguments.device, arguments.dtype)
        chosen = [one for one in all_variations() if one.name in (PUBLISHED, *arguments.only)]
        scores = measure(model, processor, chosen, arguments)
        results = [result for budget in arguments.budgets for result in summarized(scores, chosen, budget)]
        recorded = [record(results, model, arguments)]
        print(table(recorded[0]))
        if arguments.json:
            arguments.json.write_text(json.dumps(recorded[0], indent=2) + "\n", encoding="utf-8")
    if arguments.note:
        arguments.note.write_text(note(recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
