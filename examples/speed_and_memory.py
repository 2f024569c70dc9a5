"""What selecting costs: time of each step, time to first token and memory, beside what it replaces.

    python speed_and_memory.py --selection --json examples/results/selection.json
    python speed_and_memory.py --selection --tiny

With `--selection` it measures, at the shapes of Qwen2.5-VL-7B with random weights,

- one layer's selection by step, beside the same with the whole attention of the proxies in memory, as it was published,
  and the least time that its operations and bytes need at the rates measured here;
- whole prefills, time and peak memory, with DynamicCache and with ShiftKVCache in turn.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
import triton
from tqdm import tqdm

import prefill_benchmark
import selection_benchmark
from common import output_file, positive_integer
from random_models import random_model

PREFILL_REPEATS = 7


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments; exits with a message when they are wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--selection", action="store_true", help="measure the selection during prefill")
    add("--lengths", type=positive_integer, nargs="+", default=[2048, 8192, 32768], help="prompt tokens")
    add("--batches", type=positive_integer, nargs="+", default=[1, 8], help="rows, for the selection of one layer")
    add("--budget", type=positive_integer, default=64, help="tokens kept per layer and KV head")
    add("--repeats", type=positive_integer, default=20, help="runs of each step, of which the median is taken")
    add("--tiny", action="store_true", help="small shapes and lengths, to try the script on a CPU")
    add("--json", type=output_file, help="write all figures, versions and settings to this file")
    arguments = parser.parse_args(argv)
    if not arguments.selection:
        parser.error("nothing to measure: give --selection")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("shapes of 7B models need a CUDA device; --tiny runs anywhere")
    return arguments


def measure_selection(arguments: argparse.Namespace, device: torch.device) -> tuple[tuple[float, float], list[Any]]:
    """The measured rates, and a row for each batch size and length."""
    shapes = selection_benchmark.TINY if arguments.tiny else selection_benchmark.Shapes(budget=arguments.budget)
    rates = selection_benchmark.measured_rates(device)
    cases = [(batch, tokens) for batch in arguments.batches for tokens in arguments.lengths]
    rows = [
        selection_benchmark.measure(shapes, batch, tokens, device, arguments.repeats, rates, "auto")
        for batch, tokens in tqdm(cases, desc="selection", unit="case")
    ]
    return rates, rows


def measure_prefill(arguments: argparse.Namespace, device: torch.device) -> list[prefill_benchmark.Prefill]:
    """Prefills of one row of tokens, at each length."""
    name, dtype = ("tiny", torch.float32) if arguments.tiny else ("qwen2.5-vl-7b", torch.bfloat16)
    model = random_model(name, device, dtype)
    return prefill_benchmark.measure(
        model,
        lengths=arguments.lengths,
        batches=[1],
        budget=arguments.budget,
        repeats=min(arguments.repeats, PREFILL_REPEATS),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    if arguments.tiny:
        arguments.lengths, arguments.batches, arguments.budget = [33, 64], [1], 8
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates, rows = measure_selection(arguments, device)
    prefills = measure_prefill(arguments, device)
    print(f"measured: matrix products {rates[0] / 1e12:.1f} TFLOP/s, copies {rates[1] / 1e9:.0f} GB/s")
    print("\nselection, milliseconds per layer (steps: from graph replay)")
    print("\n".join(selection_benchmark.table(rows)))
    print("\nprefill to the first token, cache building included")
    print(prefill_benchmark.table(prefills))
    if arguments.json:
        record = {
            "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
            "environment": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "triton": triton.__version__,
                "python": platform.python_version(),
            },
            "rates": {"products_per_second": rates[0], "bytes_per_second": rates[1]},
            "selection": [asdict(row) for row in rows],
            "prefill": [asdict(row) for row in prefills],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
