"""Where the time of a decoding step goes: by kernel, beside the time to read the weights once; and cold starts.

    python examples/benchmarks/speed/profile_step.py --random-weights qwen2.5-vl-7b --cold --json step.json
    python examples/benchmarks/speed/profile_step.py --random-weights tiny --length 40 --new-tokens 8

For each size of the batch and each budget: milliseconds a token with `decode_ahead`, whose step is compiled as a whole
("whole") or block by block ("blocks"), and the kernels of the latter. With `--cold`, for the first batch and budget,
what the first answer takes longer than a later one in a new process that finds nothing compiled on its disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.arguments import drop_repeats, need_packages
from benchmarks.speed.random_models import SHAPES
from benchmarks.speed.rows import UNTIMED
from common import DTYPES, choose_device, output_file, positive_integer, script_parser

WAYS = ("whole", "blocks")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments; exits with a message when they are wrong."""
    parser = script_parser(__doc__)
    need_packages(parser, ("tabulate", "tqdm"))
    add = parser.add_argument
    add("--random-weights", choices=SHAPES, default="qwen2.5-vl-7b", help="shapes (default: %(default)s)")
    add("--batches", type=positive_integer, nargs="+", default=[1], help="rows decoded together (default: 1)")
    add("--budgets", type=positive_integer, nargs="+", default=[64], help="tokens kept (default: 64)")
    add("--length", type=positive_integer, default=2048, help="tokens of each prompt (default: %(default)s)")
    add("--new-tokens", type=positive_integer, default=256, help=f"the first {UNTIMED} are not timed (default: 256)")
    add("--repeats", type=positive_integer, default=2, help="measured runs (default: %(default)s)")
    add("--dtype", choices=DTYPES[1:], default="bfloat16", help="default: %(default)s")
    add("--attn", default="sdpa", help="attention implementation (default: %(default)s)")
    add("--device", type=choose_device, help="where to run (default: the GPU if there is one)")
    add("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="what to time (default: both)")
    add("--cold", action="store_true", help="also measure cold starts, each in a process of its own")
    add("--only-cold", choices=WAYS, help="print the seconds of one cold start and nothing else")
    add("--json", type=output_file, help="write all figures, versions and settings to this file")
    arguments = parser.parse_args(argv)
    arguments.device = arguments.device or choose_device("auto")
    if arguments.new_tokens <= UNTIMED:
        parser.error(f"--new-tokens {arguments.new_tokens}: the first {UNTIMED} of a run are not timed")
    drop_repeats(arguments, "batches", "budgets", "ways")
    return arguments


def kind_of(way: str, model: Any, budget: int) -> Any:
    """The compressed cache, decoded one of the two ways."""
    from transformers import CompileConfig

    from benchmarks.speed.decoding import decode_ahead_kind, shiftkv_kind
    from mmshiftkv import decoding_backend

    kind = replace(decode_ahead_kind(shiftkv_kind(model, budget)), name=way)
    if way == "blocks":
        return kind
    whole = CompileConfig(backend=decoding_backend, mode=None)
    return replace(kind, generate={**kind.generate, "compile_config": whole})


def answer(model: Any, kind: Any, batch: int, arguments: argparse.Namespace) -> float:
    """Generates one answer; the seconds that it took."""
    import torch

    from benchmarks.speed.decoding import random_prompt, synchronize
    from mmshiftkv import CACHE_ARGUMENT

    ids = random_prompt(model, batch, arguments.length)
    synchronize(model.device)
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_ARGUMENT: kind.make_cache(arguments.length, arguments.new_tokens)},
        max_new_tokens=arguments.new_tokens,
        do_sample=False,
        **kind.generate,
    )
    synchronize(model.device)
    return time.perf_counter() - start


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads: all but those of other models in it, and the table of embeddings."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = {id(part): part.nbytes for module in (model.get_decoder(), head) for part in module.parameters()}
    if embeddings.weight is not head.weight:
        del parts[id(embeddings.weight)]
    return sum(parts.values())


def kernels(model: Any, kind: Any, batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The kernels of an answer's steps, a step's share of each; those of the prefill are taken away."""
    import torch

    def totals(new_tokens: int) -> dict[str, list[float]]:
        run = argparse.Namespace(**{**vars(arguments), "new_tokens": new_tokens})
        fixed = replace(kind, make_cache=lambda tokens, new: kind.make_cache(tokens, arguments.new_tokens))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            answer(model, fixed, batch, run)
        found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for event in trace.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                found[event.name][0] += 1
                found[event.name][1] += event.device_time_total
        return found

    few, steps = 2, 16
    before, after = totals(few), totals(few + steps)
    rows: list[dict[str, Any]] = [
        {
            "kernel": name,
            "calls": (calls - before[name][0]) / steps,
            "microseconds": (spent - before[name][1]) / steps,
        }
        for name, (calls, spent) in after.items()
    ]
    return sorted((row for row in rows if row["calls"] > 0), key=lambda row: -row["microseconds"])


def cold_start(way: str, arguments: argparse.Namespace) -> float:
    """Seconds that the first answer takes longer than the third, in a new process with empty caches on disk."""
    names = ("random_weights", "length", "new_tokens", "dtype", "attn", "device")
    options = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    sizes = ["--batches", str(arguments.batches[0]), "--budgets", str(arguments.budgets[0])]
    with tempfile.TemporaryDirectory() as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        printed = subprocess.run(
            [sys.executable, __file__, *options, *sizes, "--only-cold", way],
            env={**os.environ, **places},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    return json.loads(printed.splitlines()[-1])["seconds"]


def load(arguments: argparse.Namespace) -> Any:
    """The model, with the plainest settings of generation."""
    import torch
    from transformers import GenerationConfig

    from benchmarks.speed.random_models import random_model

    dtype = getattr(torch, arguments.dtype)
    model = random_model(arguments.random_weights, arguments.device, dtype, attention=arguments.attn)
    model.generation_config = GenerationConfig()
    return model


def print_cold_start(arguments: argparse.Namespace) -> None:
    """One cold start, in this process."""
    model = load(arguments)
    kind = kind_of(arguments.only_cold, model, arguments.budgets[0])
    first, _, third = (answer(model, kind, arguments.batches[0], arguments) for _ in range(3))
    print(json.dumps({"seconds": first - third}))


def profile(model: Any, batch: int, budget: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one batch size and budget."""
    from benchmarks.speed import decoding

    kinds = [kind_of(way, model, budget) for way in arguments.ways]
    (rows,) = decoding.measure(
        model,
        kinds,
        batches=[batch],
        lengths=[arguments.length],
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
    )
    found = kernels(model, kinds[-1], batch, arguments) if arguments.device.type == "cuda" else []
    times = {row.cache: row.milliseconds for row in rows}
    graphs = {row.cache: [row.graphs, row.graphs_while_measured] for row in rows}
    return {"batch": batch, "budget": budget, "milliseconds": times, "graphs": graphs, "kernels": found}


def show(record: dict[str, Any]) -> None:
    """Prints all of it."""
    from tabulate import tabulate

    print(f"weights: {record['weight_bytes'] / 1e9:.2f} GB, read in {record['milliseconds_to_read']:.2f} ms")
    for way, seconds in record["cold_starts"].items():
        print(f"cold start, {way}: {seconds:.1f} s")
    for step in record["steps"]:
        times = ", ".join(f"{way} {spent:.3f} ms" for way, spent in step["milliseconds"].items())
        print(f"\nbatch {step['batch']}, budget {step['budget']}: {times} a token")
        in_all = sum(row["microseconds"] for row in step["kernels"])
        rows = [(row["kernel"][:90], f"{row['calls']:.1f}", f"{row['microseconds']:.1f}") for row in step["kernels"]]
        print(tabulate([*rows, ("in all", "", f"{in_all:.1f}")], headers=("kernel", "calls", "microseconds a step")))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script."""
    arguments = parse_arguments(argv)
    if arguments.only_cold:
        print_cold_start(arguments)
        return
    cold = {way: cold_start(way, arguments) for way in arguments.ways} if arguments.cold else {}
    from benchmarks.speed.device_work import measured_rates

    _, rate = measured_rates(arguments.device)
    model = load(arguments)
    names = ("random_weights", "length", "new_tokens", "repeats", "dtype", "attn")
    record = {
        "settings": {name: getattr(arguments, name) for name in names},
        "environment": report.environment(arguments.device),
        "weight_bytes": weight_bytes(model),
        "milliseconds_to_read": 1e3 * weight_bytes(model) / rate,
        "cold_starts": cold,
        "steps": [
            profile(model, batch, budget, arguments) for batch in arguments.batches for budget in arguments.budgets
        ],
    }
    show(record)
    if arguments.json:
        report.write_record(arguments.json, record)


if __name__ == "__main__":
    main()
