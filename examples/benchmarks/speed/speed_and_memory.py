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
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.speed import decoding, decoding_report, prefill, selection
from benchmarks.speed.random_models import SHAPES, random_model
from common import DTYPES, choose_device, existing_file, output_file, positive_integer

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PREFILL_REPEATS = 7
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
        help=f"generated in each run; the first {decoding.UNTIMED} are not timed (default: 256; CPU: 32)",
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
    if arguments.new_tokens <= decoding.UNTIMED:
        parser.error(f"--new-tokens {arguments.new_tokens}: the first {decoding.UNTIMED} of a run are not timed")


def load_model(arguments: argparse.Namespace) -> Any:
    """The model to decode with, on its device, ready for inference."""
    name, device = arguments.model or str(ASSETS / "tiny_qwen2_5_vl"), arguments.device
    if arguments.random_weights:
        dtype = getattr(torch, arguments.dtype)
        return random_model(arguments.random_weights, device, dtype, attention=arguments.attn)
    sees_images = type(AutoConfig.from_pretrained(name)) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    model = auto.from_pretrained(name, dtype=arguments.dtype, attn_implementation=arguments.attn)
    return model.to(device).eval()


def fitting_lengths(model: Any, arguments: argparse.Namespace) -> list[int]:
    """The lengths, less those of the defaults that the model has no positions for.

    Raises:
        ValueError: there are none left, or one that was asked for is too long.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return arguments.lengths
    fitting = [tokens for tokens in arguments.lengths if tokens + arguments.new_tokens <= positions]
    left_out = [tokens for tokens in arguments.lengths if tokens not in fitting]
    if left_out:
        reason = f"with {arguments.new_tokens} new tokens {left_out} are more than the model's {positions} positions"
        if not (arguments.may_drop_lengths and fitting):
            raise ValueError(f"--lengths: {reason}")
        print(f"left out: {reason}", file=sys.stderr)
    return fitting


def cache_kinds(model: Any, arguments: argparse.Namespace) -> list[decoding.CacheKind]:
    """The caches that were asked for.

    Raises:
        TypeError, ValueError: one of them does not support the model.
    """
    kinds = []
    if "dynamic" in arguments.caches:
        kinds.append(decoding.dynamic_kind(model))
    if "static" in arguments.caches:
        kinds.append(decoding.static_kind(model))
    if "shiftkv" in arguments.caches:
        for budget in arguments.budgets:
            kind = decoding.shiftkv_kind(model, budget)
            kinds += [kind, decoding.decode_ahead_kind(kind)]
    for kind in kinds:
        kind.make_cache(arguments.lengths[0], arguments.new_tokens)
    return kinds


def environment(device: torch.device) -> dict[str, str]:
    """What the figures were measured on and with."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def decoding_settings(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the rows were measured with, for the file of `--json`."""
    folder = Path(arguments.model or ASSETS / "tiny_qwen2_5_vl")
    checkpoint = folder.resolve().name if folder.is_dir() else arguments.model
    names = ("lengths", "batches", "budgets", "caches", "new_tokens", "repeats")
    return {
        "model": f"{arguments.random_weights}, random weights" if arguments.random_weights else checkpoint,
        "model_bytes": sum(part.nbytes for part in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": arguments.attn,
        **{name: getattr(arguments, name) for name in names},
        "untimed_tokens": decoding.UNTIMED,
    }


def decode(arguments: argparse.Namespace) -> None:
    """Measures decoding; prints the table and writes what was asked for."""
    try:
        model = load_model(arguments)
        arguments.lengths = fitting_lengths(model, arguments)
        kinds = cache_kinds(model, arguments)
    except (OSError, TypeError, ValueError) as error:  # a checkpoint, lengths or a model that will not do
        sys.exit(f"speed_and_memory.py: error: {error}")
    record: dict[str, Any] = {
        "settings": decoding_settings(model, arguments),
        "environment": environment(model.device),
        "rows": [],
    }
    for rows in decoding.measure(
        model,
        kinds,
        batches=arguments.batches,
        lengths=arguments.lengths,
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
    ):
        record["rows"] += [asdict(row) for row in rows]
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show([record], arguments.plot)


def show(records: Sequence[dict[str, Any]], plot: Path | None) -> None:
    """Prints the rows of all records under what they have in common, and draws them into the file `plot`, if any.

    Raises:
        ValueError: they are of different models, numbers of new tokens or devices.
    """
    titles = [
        "{model}, {dtype}, {device}: {new_tokens} new tokens".format(**record["settings"], **record["environment"])
        for record in records
    ]
    if len(set(titles)) > 1:
        raise ValueError(f"--read: these cannot be shown together: {'; '.join(sorted(set(titles)))}")
    rows = [decoding_report.Row(**row) for record in records for row in record["rows"]]
    print(titles[0], decoding_report.table(rows), sep="\n\n")
    if plot:
        decoding_report.draw_plot(rows, titles[0]).savefig(plot, dpi=150)


def read(arguments: argparse.Namespace) -> None:
    """Shows what was measured earlier."""
    try:
        show([json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments.read], arguments.plot)
    except (KeyError, TypeError, ValueError) as error:  # other JSON, or other measurements
        sys.exit(f"speed_and_memory.py: error: {error}")


def measure_selection(arguments: argparse.Namespace, device: torch.device) -> tuple[tuple[float, float], list[Any]]:
    """The measured rates, and a row for each batch size and length."""
    shapes = selection.TINY if arguments.tiny else selection.Shapes(budget=arguments.budgets[0])
    rates = selection.measured_rates(device)
    cases = [(batch, tokens) for batch in arguments.batches for tokens in arguments.lengths]
    rows = [
        selection.measure(shapes, batch, tokens, device, arguments.repeats, rates, "auto")
        for batch, tokens in tqdm(cases, desc="selection", unit="case")
    ]
    return rates, rows


def measure_prefill(arguments: argparse.Namespace, device: torch.device) -> list[prefill.Prefill]:
    """Prefills of one row of tokens, at each length."""
    name, dtype = ("tiny", torch.float32) if arguments.tiny else ("qwen2.5-vl-7b", torch.bfloat16)
    model = random_model(name, device, dtype)
    return prefill.measure(
        model,
        lengths=arguments.lengths,
        batches=[1],
        budget=arguments.budgets[0],
        repeats=min(arguments.repeats, PREFILL_REPEATS),
    )


def select(arguments: argparse.Namespace) -> None:
    """Measures the selection and prefills; prints the tables and writes what was asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates, rows = measure_selection(arguments, device)
    prefills = measure_prefill(arguments, device)
    print(f"measured: matrix products {rates[0] / 1e12:.1f} TFLOP/s, copies {rates[1] / 1e9:.0f} GB/s")
    print("\nselection, milliseconds per layer (steps: from graph replay)")
    print("\n".join(selection.table(rows)))
    print("\nprefill to the first token, cache building included")
    print(prefill.table(prefills))
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("selection", "lengths", "batches", "repeats", "tiny")}
        record = {
            "settings": {**settings, "budget": arguments.budgets[0]},
            "environment": environment(device),
            "rates": {"products_per_second": rates[0], "bytes_per_second": rates[1]},
            "selection": [asdict(row) for row in rows],
            "prefill": [asdict(row) for row in prefills],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    (select if arguments.selection else read if arguments.read else decode)(arguments)


if __name__ == "__main__":
    main()
