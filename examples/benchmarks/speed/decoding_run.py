"""Loads what speed_and_memory.py is asked to measure, and measures decoding."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks import report
from benchmarks.speed import decoding
from benchmarks.speed.random_models import SHAPES, random_model
from benchmarks.speed.rows import LOOPS, UNTIMED
from common import TINY_MODEL, errors_in_one_line


def model_config(arguments: argparse.Namespace) -> Any:
    """The configuration of the model to decode with, without the model."""
    if arguments.random_weights:
        return SHAPES[arguments.random_weights]()[1]
    return AutoConfig.from_pretrained(arguments.model or str(TINY_MODEL))


def load_model(arguments: argparse.Namespace) -> Any:
    """The model to decode with, on its device, ready for inference."""
    name, device = arguments.model or str(TINY_MODEL), arguments.device
    if arguments.random_weights:
        dtype = getattr(torch, arguments.dtype)
        return random_model(arguments.random_weights, device, dtype, attention=arguments.attn)
    sees_images = type(model_config(arguments)) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    model = auto.from_pretrained(name, dtype=arguments.dtype, attn_implementation=arguments.attn)
    return model.to(device).eval()


def fitting_lengths(config: Any, arguments: argparse.Namespace) -> list[int]:
    """The lengths, less those of the defaults that the model has no positions for.

    Raises:
        ValueError: there are none left, or one that was asked for is too long.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
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
            kinds += in_loops(decoding.shiftkv_kind(model, budget), arguments.loops)
    for kind in kinds:
        kind.make_cache(arguments.lengths[0], arguments.new_tokens)
    return kinds


def in_loops(kind: decoding.CacheKind, loops: Sequence[str]) -> list[decoding.CacheKind]:
    """A compressed cache in each of these loops."""
    return [kind if loop == LOOPS[0] else decoding.decode_ahead_kind(kind) for loop in loops]


def model_name(arguments: argparse.Namespace) -> str:
    """What the model is called, for the file of `--json`: of a local folder only its own name."""
    if arguments.random_weights:
        return f"{arguments.random_weights}, random weights"
    folder = Path(arguments.model or TINY_MODEL)
    return folder.resolve().name if folder.is_dir() else arguments.model


def decoding_settings(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the rows were measured with, for the file of `--json`."""
    names = ("lengths", "batches", "budgets", "caches", "new_tokens", "repeats")
    return {
        "model": model_name(arguments),
        "model_bytes": sum(part.nbytes for part in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": arguments.attn,
        **{name: getattr(arguments, name) for name in names},
        "untimed_tokens": UNTIMED,
    }


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures decoding; the record of it, which is also written to the file of `--json`."""
    with errors_in_one_line():  # a checkpoint, lengths or a model that will not do
        model = load_model(arguments)
        arguments.lengths = fitting_lengths(model.config, arguments)
        kinds = cache_kinds(model, arguments)
    record: dict[str, Any] = {
        "settings": decoding_settings(model, arguments),
        "environment": report.environment(model.device),
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
            report.write_record(arguments.json, record)
    return record
