"""What decoding takes with full caches and with compressed ones, or what the selection costs.

    python speed_and_memory.py --random-weights qwen2.5-vl-7b --json decode.json --plot decode.png
    python speed_and_memory.py --model Qwen/Qwen2.5-VL-7B-Instruct --batches 1 --lengths 2048 8192
    python speed_and_memory.py --selection --json examples/benchmarks/results/selection.json

Without `--selection` it measures the time per token and the memory of plain `model.generate` with DynamicCache,
StaticCache and ShiftKVCache, by length of the prompt and size of the batch; decoding.py says how. Prompts are
random text, so that any decoder will do, and no token ends them. Without a model the small Qwen2.5-VL next to this file
decodes. The file of `--json` is written anew after each batch size.

With `--selection` it measures, at the shapes of Qwen2.5-VL-7B with random weights,

- one layer's selection by step, beside the same with the whole attention of the proxies in memory, as it was published,
  and the least time that its operations and bytes need at the rates measured here;
- whole prefills, time and peak memory, with DynamicCache and with ShiftKVCache in turn.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.speed.decoding_run import decode, read
from benchmarks.speed.random_models import SHAPES
from benchmarks.speed.rows import UNTIMED
from benchmarks.speed.selection_run import select
from common import DTYPES, choose_device, existing_file, output_file, positive_integer

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
    "selection": {"lengths": [2048, 8192, 32768], "batches": [1, 8], "budgets": [64], "repeats": 20},
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, defaults filled in; exits with a message when they are wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--lengths", type=positive_integer, nargs="+", help="prompt tokens (default: 2048 to 32768; CPU: 256 to 1024)")
    add("--batches", type=positive_integer, nargs="+", help="rows decoded, or selected from, together (default: 1 8)")
    add(
        "--budgets",
        "--budget",
        type=positive_integer,
        nargs="+",
        help="tokens kept per layer and KV head (default: 64 512; CPU: 64 128; --selection takes one, default: 64)",
    )
    add("--repeats", type=positive_integer, help="measured runs (default: 3; of each step of a selection: 20)")
    add("--json", type=output_file, help="write all figures, versions and settings to this file")
    _add_decoding(parser.add_argument_group("decoding"))
    selection = parser.add_argument_group("selection")
    selection.add_argument("--selection", action="store_true", help="measure the selection during prefill instead")
    selection.add_argument("--tiny", action="store_true", help="small shapes and lengths, to try it on a CPU")
    arguments = parser.parse_args(argv)
    (_check_selection if arguments.selection else _check_decoding)(parser, arguments)
    for name in ("lengths", "batches", "budgets"):
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))
    return arguments


def _add_decoding(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument("--model", help="hub id or local folder (default: the small Qwen2.5-VL next to this script)")
    source.add_argument("--random-weights", choices=SHAPES, help="a model of these shapes, without a checkpoint")
    group.add_argument("--caches", nargs="+", choices=CACHES, help="which to measure (default: all)")
    group.add_argument(
        "--new-tokens",
        type=positive_integer,
        help=f"generated in each run; the first {UNTIMED} are not timed (default: 256; CPU: 32)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="auto: the checkpoint's (default: bfloat16; CPU: float32)")
    group.add_argument("--attn", help="attention implementation (default: sdpa)")
    group.add_argument("--device", type=choose_device, help="where to run (default: the GPU if there is one)")
    group.add_argument(
        "--read",
        type=existing_file,
        nargs="+",
        metavar="JSON",
        help="measure nothing; show these files of --json together",
    )
    group.add_argument("--plot", type=output_file, help="draw time and memory into this file (.png, .svg or .pdf)")


def _fill_in(arguments: argparse.Namespace, defaults: dict[str, Any]) -> None:
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _check_selection(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for name in ("model", "random_weights", "caches", "new_tokens", "dtype", "attn", "device", "plot", "read"):
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes without --selection")
    _fill_in(arguments, DEFAULTS["selection"])
    if len(arguments.budgets) > 1:
        parser.error(f"--selection takes one budget, got {arguments.budgets}")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("shapes of 7B models need a CUDA device; --tiny runs anywhere")
    if arguments.tiny:
        arguments.lengths, arguments.batches, arguments.budgets = [33, 64], [1], [8]


def _check_decoding(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.tiny:
        parser.error("--tiny goes with --selection; for a small model to decode with: --random-weights tiny")
    if arguments.random_weights and arguments.dtype == "auto":
        parser.error("--dtype auto is that of a checkpoint, and --random-weights has none")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error('--plot needs matplotlib: pip install "mmshiftkv[plot]"')
    arguments.device = arguments.device or choose_device("auto")
    arguments.caches, arguments.attn = arguments.caches or list(CACHES), arguments.attn or "sdpa"
    arguments.may_drop_lengths = arguments.lengths is None
    _fill_in(arguments, DEFAULTS["cuda" if arguments.device.type == "cuda" else "cpu"])
    if arguments.new_tokens <= UNTIMED:
        parser.error(f"--new-tokens {arguments.new_tokens}: the first {UNTIMED} of a run are not timed")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    (select if arguments.selection else read if arguments.read else decode)(arguments)


if __name__ == "__main__":
    main()
