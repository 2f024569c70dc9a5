"""Loads what speed_and_memory.py is asked to measure, measures decoding, and shows it."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.report import environment
from benchmarks.speed import decoding, decoding_pictures, decoding_report
from benchmarks.speed.random_models import random_model
from benchmarks.speed.rows import UNTIMED, Row
from common import TINY_MODEL


def load_model(arguments: argparse.Namespace) -> Any:
    """The model to decode with, on its device, ready for inference."""
    name, device = arguments.model or str(TINY_MODEL), arguments.device
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


def decoding_settings(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the rows were measured with, for the file of `--json`."""
    folder = Path(arguments.model or TINY_MODEL)
    checkpoint = folder.resolve().name if folder.is_dir() else arguments.model
    names = ("lengths", "batches", "budgets", "caches", "new_tokens", "repeats")
    return {
        "model": f"{arguments.random_weights}, random weights" if arguments.random_weights else checkpoint,
        "model_bytes": sum(part.nbytes for part in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": arguments.attn,
        **{name: getattr(arguments, name) for name in names},
        "untimed_tokens": UNTIMED,
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
    rows = [Row(**row) for record in records for row in record["rows"]]
    print(titles[0], decoding_report.table(rows), sep="\n\n")
    if plot:
        decoding_pictures.draw_plot(rows, titles[0]).savefig(plot, dpi=150)


def read(arguments: argparse.Namespace) -> None:
    """Shows what was measured earlier."""
    try:
        show([json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments.read], arguments.plot)
    except (KeyError, TypeError, ValueError) as error:  # other JSON, or other measurements
        sys.exit(f"speed_and_memory.py: error: {error}")
