"""What decoding takes with full caches and with compressed ones, or what the selection costs.

    python examples/benchmarks/speed/speed_and_memory.py --random-weights qwen2.5-vl-7b --json decoding.json
    python examples/benchmarks/speed/speed_and_memory.py --model Qwen/Qwen2.5-VL-7B-Instruct --lengths 2048 8192
    python examples/benchmarks/speed/speed_and_memory.py --random-weights qwen2.5-vl-7b --lengths 2048 --batches 32 64
        --budgets 64 --new-tokens 64 --repeats 2 --json decoding_batch_32_64.json
    python examples/benchmarks/speed/speed_and_memory.py --read decoding.json --plot decoding.png
    python examples/benchmarks/speed/speed_and_memory.py --selection --json selection.json
    python examples/benchmarks/speed/speed_and_memory.py --random-weights qwen2.5-vl-7b --cold-start
        --prompts-of-different-length 200 --json starts.json
    python examples/benchmarks/speed/speed_and_memory.py --read new.json --check decoding.json

Without `--selection` it measures the time per token and the memory of plain `model.generate` with DynamicCache,
StaticCache and ShiftKVCache, by length of the prompt and size of the batch; decoding.py says how. Prompts are
random text, so that any decoder will do, and no token ends them. Without a model the small Qwen2.5-VL of this
repository decodes. What runs out of memory says so in its row, and the others go on. The file of `--json` is written
anew after each batch size. `--plot decoding.png` draws two pictures: the time per token into decoding_time.png, the
memory that the caches hold into decoding_memory.png.

With `--selection` it measures, at the shapes of Qwen2.5-VL-7B with random weights,

- one layer's selection by step, as published, and counting values without and with a refit (at every budget); beside
  the published one the same with the whole attention of the proxies in memory, as it was published, and the least time
  that its operations and bytes need at the rates measured here;
- whole prefills, time and peak memory, with DynamicCache and with ShiftKVCache in turn, at the first budget; "asked" is
  the published selection with queries asked of the attention modules, as for models whose queries cannot be rebuilt.

With `--cold-start` it measures the first call of `generate` in new processes, up to its second token, at the longest
of `--lengths`, with `--prompts-of-different-length N` how soon N prompts have their first token, their lengths between
the shortest and the longest of `--lengths`, and what they compile. starts.py says how.

`--check RECORD` compares what was measured, or read, with what an earlier run wrote, records of joined.py included, and
ends with status 1 if something became worse or nothing could be compared. Times of two hosts are several times apart,
so that ratios within a run are compared: figures.py says to what. Bytes and counts are compared as they are.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.arguments import drop_repeats, need_packages
from benchmarks.speed.checking import TOLERANCE, check
from benchmarks.speed.figures import figures, what_it_is_of
from benchmarks.speed.random_models import SHAPES
from benchmarks.speed.rows import LOOPS, UNTIMED, WARMING_UP
from common import DTYPES, choose_device, errors_in_one_line, output_file, picture_file, positive_integer, script_parser

CACHES = ("dynamic", "static", "shiftkv")
# By device; "selection" has its own.  A CPU decodes with the small model in a minute or two.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "lengths": [2048, 4096, 8192, 16384, 32768],
        "batches": [1, 8],
        "budgets": [64, 512],
        "new_tokens": 256,
        "repeats": 3,
        "dtype": "bfloat16",
    },
    "cpu": {
        "lengths": [256, 512, 1024],
        "batches": [1, 8],
        "budgets": [64, 128],
        "new_tokens": 32,
        "repeats": 3,
        "dtype": "float32",
    },
    "selection": {"lengths": [2048, 8192, 32768], "batches": [1, 8], "budgets": [64, 256, 512], "repeats": 20},
}
STARTS: dict[str, dict[str, Any]] = {  # a new process for each cache and repeat
    "cuda": {"lengths": [64, 8192], "budgets": [64], "repeats": 1},
    "cpu": {"lengths": [16, 256], "budgets": [64], "repeats": 1},
}


def record_file(text: str) -> dict[str, Any]:
    """An argparse type: what speed_and_memory.py has written as JSON, by the path of the file."""
    return report.read_record(text, "speed_and_memory.py", figures)


def named_record_file(text: str) -> tuple[str, dict[str, Any]]:
    """As `record_file`, with the path before it."""
    return text, record_file(text)


def share(text: str) -> float:
    """An argparse type: a number that is not negative; 0.1 is a tenth."""
    with contextlib.suppress(ValueError):
        if 0 <= (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"needs a number, at least 0, such as 0.1 for a tenth, got {text!r}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, defaults filled in; exits with a message when they are wrong."""
    parser = script_parser(__doc__)
    need_packages(parser, ("tabulate", "tqdm"))
    add = parser.add_argument
    add("--lengths", type=positive_integer, nargs="+", help="prompt tokens (default: 2048 to 32768; CPU: 256 to 1024)")
    add("--batches", type=positive_integer, nargs="+", help="rows decoded, or selected from, together (default: 1 8)")
    add(
        "--budgets",
        "--budget",
        type=positive_integer,
        nargs="+",
        help="tokens kept per layer and KV head (default: 64 512; CPU: 64 128; --selection: 64 256 512)",
    )
    add("--repeats", type=positive_integer, help="measured runs (default: 3; of each step of a selection: 20)")
    add("--json", type=output_file, help="write all figures, versions and settings to this file")
    _add_records(parser.add_argument_group("earlier runs"))
    _add_decoding(parser.add_argument_group("decoding"))
    selection = parser.add_argument_group("selection")
    selection.add_argument("--selection", action="store_true", help="measure the selection during prefill instead")
    selection.add_argument("--tiny", action="store_true", help="small shapes and lengths, to try it on a CPU")
    _add_starts(parser.add_argument_group("starts"))
    arguments = parser.parse_args(argv)
    arguments.starts = arguments.cold_start or arguments.prompts_of_different_length is not None
    if not arguments.read:
        (_check_selection if arguments.selection else _check_decoding)(parser, arguments)
        drop_repeats(arguments, "lengths", "batches", "budgets")
    for name in ("json", "selection", "starts"):
        if arguments.read and getattr(arguments, name):
            parser.error(f"--{'cold-start' if name == 'starts' else name} goes without --read")
    if arguments.tolerance is not None and not arguments.check:
        parser.error("--tolerance goes with --check")
    return arguments


def _add_records(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--read",
        type=record_file,
        nargs="+",
        metavar="JSON",
        help="measure nothing; show these files of --json together",
    )
    group.add_argument(
        "--check",
        type=named_record_file,
        nargs="+",
        metavar="RECORD",
        help="compare with these files of --json; status 1 if something became worse",
    )
    group.add_argument(
        "--tolerance",
        type=share,
        help=f"how much slower is as recorded, beside what the runs spread (default: {TOLERANCE}, a tenth)",
    )


def _add_decoding(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument("--model", help="hub id or local folder (default: the small Qwen2.5-VL of this repository)")
    source.add_argument("--random-weights", choices=SHAPES, help="a model of these shapes, without a checkpoint")
    group.add_argument("--caches", nargs="+", choices=CACHES, help="which to measure (default: all)")
    group.add_argument("--loops", nargs="+", choices=LOOPS, help="what decodes on ShiftKVCache (default: both)")
    group.add_argument(
        "--new-tokens",
        type=positive_integer,
        help=f"generated in each run; the first {UNTIMED} are not timed (default: 256; CPU: 32)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="auto: the checkpoint's (default: bfloat16; CPU: float32)")
    group.add_argument("--attn", help="attention implementation (default: sdpa)")
    group.add_argument("--device", type=choose_device, help="where to run (default: the GPU if there is one)")
    group.add_argument(
        "--plot",
        type=picture_file,
        metavar="PICTURE",
        help="for NAME.png, or another ending, draw NAME_time.png and NAME_memory.png",
    )


def _add_starts(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cold-start", action="store_true", help="measure the first call in new processes instead")
    group.add_argument(
        "--prompts-of-different-length",
        type=positive_integer,
        metavar="N",
        help=f"measure N prompts, more than {WARMING_UP}, in new processes instead",
    )


def _check_starts(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    count = arguments.prompts_of_different_length
    if count is not None and count <= WARMING_UP:
        parser.error(f"--prompts-of-different-length {count}: the first {WARMING_UP} are not counted")
    for name in ("batches", "plot"):
        if getattr(arguments, name) is not None:
            parser.error(f"--{name} goes without --cold-start and --prompts-of-different-length")
    _fill_in(arguments, STARTS["cuda" if arguments.device.type == "cuda" else "cpu"])


def _fill_in(arguments: argparse.Namespace, defaults: dict[str, Any]) -> None:
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _check_selection(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.starts:
        parser.error("--selection goes without --cold-start and --prompts-of-different-length")
    for name in ("model", "random_weights", "caches", "loops", "new_tokens", "dtype", "attn", "device", "plot"):
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes without --selection")
    _fill_in(arguments, DEFAULTS["selection"])
    arguments.device = choose_device("auto")
    if not arguments.tiny and arguments.device.type != "cuda":
        parser.error("shapes of 7B models need a CUDA device; --tiny runs anywhere")
    if arguments.tiny:
        arguments.lengths, arguments.batches, arguments.budgets = [33, 64], [1], [8]


def _check_decoding(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.tiny:
        parser.error("--tiny goes with --selection; for a small model to decode with: --random-weights tiny")
    if arguments.random_weights and arguments.dtype == "auto":
        parser.error("--dtype auto is that of a checkpoint, and --random-weights has none")
    arguments.device = arguments.device or choose_device("auto")
    arguments.caches, arguments.attn = arguments.caches or list(CACHES), arguments.attn or "sdpa"
    arguments.loops = [loop for loop in LOOPS if loop in (arguments.loops or LOOPS)]
    arguments.may_drop_lengths = arguments.lengths is None
    if arguments.starts:
        _check_starts(parser, arguments)
    _fill_in(arguments, DEFAULTS["cuda" if arguments.device.type == "cuda" else "cpu"])
    if arguments.new_tokens <= UNTIMED:
        parser.error(f"--new-tokens {arguments.new_tokens}: the first {UNTIMED} of a run are not timed")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of what is asked for, which is also written to the file of `--json`."""
    if arguments.selection:
        from benchmarks.speed.selection_run import select

        return select(arguments)
    if arguments.starts:
        from benchmarks.speed.starts import measure as measure_starts

        return measure_starts(arguments)
    from benchmarks.speed.decoding_run import decode

    return decode(arguments)


def show(records: Sequence[dict[str, Any]], plot: Path | None) -> None:
    """Prints records of one kind, and draws those of decoding.

    Raises:
        ValueError: they cannot be shown together, or not drawn.
    """
    kinds = {what_it_is_of(record) for record in records}
    if len(kinds) > 1:
        raise ValueError(f"--read: these cannot be shown together: records of {' and of '.join(sorted(kinds))}")
    if plot and kinds != {"decoding"}:
        raise ValueError("--plot: only records of decoding are drawn")
    if kinds == {"selection"}:
        from benchmarks.speed.selection_run import show as show_one
    elif kinds == {"starts"}:
        from benchmarks.speed.starts import show as show_one
    else:
        from benchmarks.speed.decoding_report import show as show_decoding

        show_decoding(records, plot)
        return
    for record in records:
        show_one(record)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    records = arguments.read or [measure(arguments)]
    with errors_in_one_line():
        show(records, arguments.plot)
    if arguments.check:
        check(records, dict(arguments.check), TOLERANCE if arguments.tolerance is None else arguments.tolerance)


if __name__ == "__main__":
    main()
