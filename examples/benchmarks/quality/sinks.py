"""Measure how much attention each layer's most attended prompt token gets while a model decodes: is it a sink?

    python examples/benchmarks/quality/sinks.py --count 20
    python examples/benchmarks/quality/sinks.py --model examples/assets/tiny_llava_next --count 20

Attention sinks are single tokens, often the first of a prompt, that take a large share of nearly all queries'
attention. The full cache's own answers are decoded, and of each prompt the token with the most attention is taken:
averaged over a layer's query heads and over the queries of all decoding steps. The table has the mean over the prompts,
and which token it is in most of them.
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
from common import choose_device, errors_in_one_line, script_parser

if TYPE_CHECKING:
    from benchmarks.quality.sinks_measurement import MostAttended


def table(layers: "Sequence[MostAttended]") -> str:
    """One line for each layer: the mean share in percent, and the token that it is in most prompts."""
    rows = [
        [str(number), f"{100 * layer.mean:.1f}", token, f"{100 * share:.0f}"]
        for number, layer in enumerate(layers)
        for token, share in [layer.usual]
    ]
    return report.table(["layer", "most attended (%)", "most often", "of prompts (%)"], rows)


def record(layers: "Sequence[MostAttended]", model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures with what is needed to repeat them, ready for JSON."""
    return {
        "settings": {
            "model": arguments.model.resolve().name,
            **{name: getattr(arguments, name) for name in ("tasks", "count", "seed", "builtin_font_only")},
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "environment": report.environment(model.device),
        "layers": [{"mean": layer.mean, "tokens": dict(layer.tokens)} for layer in layers],
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, each task once; exits with a message when they are wrong."""
    need_packages(script_parser(__doc__), ("numpy", "PIL", "rapidfuzz", "tabulate", "tqdm"))
    from benchmarks.quality.questions import check_fonts, question_arguments
    from tiny_vlm.pages import HELD_OUT_SEED

    parser = script_parser(__doc__, question_arguments(None, ["lookup", "multi", "line"], HELD_OUT_SEED))
    arguments = parser.parse_args(argv)
    check_fonts(parser, arguments)
    drop_repeats(arguments, "tasks")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    from benchmarks.quality.sinks_measurement import measure
    from tiny_vlm.answering import load
    from tiny_vlm.question_sets import check_tasks

    with errors_in_one_line():
        model, processor = load(arguments.model, arguments.device or choose_device("auto"), arguments.dtype)
        check_tasks(model, arguments.tasks)
    layers = measure(model, processor, arguments)
    print(table(layers))
    if arguments.json:
        report.write_record(arguments.json, record(layers, model, arguments))


if __name__ == "__main__":
    main()
