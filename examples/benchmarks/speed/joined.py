"""Tokens per second of prompts that were compressed one by one and joined, beside batches of full caches.

    python examples/benchmarks/speed/joined.py --random-weights qwen2.5-vl-7b --json joined.json
    python examples/benchmarks/speed/joined.py --random-weights tiny --batches 1 4 --length 64 --new-tokens 8

For each size of the batch: DynamicCache and StaticCache, whose prompts are prefilled together, and prompts that
ShiftKVCache compressed one by one, joined by `mmshiftkv.join` and decoded by `generate` and by `decode_ahead`. What
runs out of memory says so, and the others go on. decoding.py says what is timed: decoding alone, no prefill. The file
of `--json` is written anew after each size.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.arguments import drop_repeats, need_packages
from benchmarks.speed.random_models import SHAPES
from benchmarks.speed.rows import LOOPS, UNTIMED
from common import DTYPES, choose_device, errors_in_one_line, output_file, positive_integer, script_parser

CUDA = {"batches": [1, 8, 32, 64], "length": 8192, "new_tokens": 256, "dtype": "bfloat16"}
CPU = {"batches": [1, 4], "length": 256, "new_tokens": 16, "dtype": "float32"}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, defaults filled in; exits with a message when they are wrong."""
    parser = script_parser(__doc__)
    need_packages(parser, ("tabulate", "tqdm"))
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="hub id or local folder (default: the small Qwen2.5-VL of this repository)")
    source.add_argument("--random-weights", choices=SHAPES, help="a model of these shapes, without a checkpoint")
    add("--batches", type=positive_integer, nargs="+", help="prompts decoded together (default: 1 8 32 64; CPU: 1 4)")
    add("--length", type=positive_integer, help="tokens of each prompt (default: 8192; CPU: 256)")
    add("--budget", type=positive_integer, default=128, help="tokens kept per layer and head (default: %(default)s)")
    add("--loops", nargs="+", choices=LOOPS, default=list(LOOPS), help="what decodes joined prompts (default: both)")
    add("--new-tokens", type=positive_integer, help=f"the first {UNTIMED} are not timed (default: 256; CPU: 16)")
    add("--repeats", type=positive_integer, default=2, help="measured runs (default: %(default)s)")
    add("--dtype", choices=DTYPES[1:], help="default: bfloat16; CPU: float32")
    add("--attn", default="sdpa", help="attention implementation (default: %(default)s)")
    add("--device", type=choose_device, help="where to run (default: the GPU if there is one)")
    add("--json", type=output_file, help="write all figures, versions and settings to this file")
    arguments = parser.parse_args(argv)
    arguments.device = arguments.device or choose_device("auto")
    for name, value in (CUDA if arguments.device.type == "cuda" else CPU).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.new_tokens <= UNTIMED:
        parser.error(f"--new-tokens {arguments.new_tokens}: the first {UNTIMED} of a run are not timed")
    drop_repeats(arguments, "batches", "loops")
    # As decoding_run.py names them.
    arguments.lengths, arguments.budgets, arguments.may_drop_lengths = [arguments.length], [arguments.budget], False
    arguments.caches = ["dynamic", "static", "joined"]
    return arguments


def joined_kind(model: Any, batch: int, budget: int) -> Any:
    """Prompts of `random_prompt`, but for their last tokens, compressed one by one and joined."""
    import torch

    from benchmarks.speed.decoding import CacheKind, random_prompt
    from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, join

    @functools.cache  # prefilled once: joining copies
    @torch.no_grad()
    def compressed(tokens: int) -> list[Any]:
        caches = []
        for row in random_prompt(model, batch, tokens)[:, :-1].split(1):
            caches.append(ShiftKVCache(model, budget=budget))
            model(row, **{CACHE_ARGUMENT: caches[-1]}, use_cache=True, logits_to_keep=1)
        return caches

    def make_cache(tokens: int, new_tokens: int) -> Any:
        return join(compressed(tokens), max_new_tokens=new_tokens + 1)

    return CacheKind(f"joined, budget {budget}", make_cache)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record, which is also written to the file of `--json`."""
    from benchmarks.speed import decoding
    from benchmarks.speed.decoding_run import decoding_settings, fitting_lengths, in_loops, load_model

    with errors_in_one_line():
        model = load_model(arguments)
        fitting_lengths(model.config, arguments)
    record: dict[str, Any] = {
        "settings": decoding_settings(model, arguments),
        "environment": report.environment(model.device),
        "rows": [],
    }
    for batch in arguments.batches:
        joined = joined_kind(model, batch, arguments.budget)
        kinds = [decoding.dynamic_kind(model), decoding.static_kind(model), *in_loops(joined, arguments.loops)]
        for rows in decoding.measure(
            model,
            kinds,
            batches=[batch],
            lengths=arguments.lengths,
            new_tokens=arguments.new_tokens,
            repeats=arguments.repeats,
        ):
            record["rows"] += [asdict(row) for row in rows]
        if arguments.json:
            report.write_record(arguments.json, record)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    record = measure(parse_arguments(argv))
    from benchmarks.speed.decoding_report import show

    show([record], None)


if __name__ == "__main__":
    main()
