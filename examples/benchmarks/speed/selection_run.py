"""Measures what speed_and_memory.py --selection asks for, and shows it."""

import argparse
import itertools
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.speed import prefill, selection
from benchmarks.speed.device_work import measured_rates
from benchmarks.speed.random_models import random_model

PREFILL_REPEATS = 7


def measure_selection(arguments: argparse.Namespace, device: torch.device) -> tuple[tuple[float, float], list[Any]]:
    """The measured rates, and a row for each method, budget, batch size and length."""
    rates = measured_rates(device)
    cases = [
        (*case, budget)
        for case in itertools.product(arguments.batches, arguments.lengths)
        for budget in arguments.budgets
    ]
    rows: list[Any] = []
    for batch, tokens, budget in tqdm(cases, desc="selection", unit="case"):
        shapes = selection.TINY if arguments.tiny else selection.Shapes(budget=budget)
        # What comes before the refit does not depend on the budget.
        methods = list(selection.STEPS) if budget == arguments.budgets[0] else ["values, refitted"]
        rows += selection.measure(shapes, methods, batch, tokens, device, arguments.repeats, rates, "auto")
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


def select(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the selection and prefills; the record of it, which is also written to the file of `--json`."""
    rates, rows = measure_selection(arguments, arguments.device)
    prefills = measure_prefill(arguments, arguments.device)
    names = ("selection", "lengths", "batches", "budgets", "repeats", "tiny")
    record = {
        "settings": {name: getattr(arguments, name) for name in names},
        "environment": report.environment(arguments.device),
        "rates": {"products_per_second": rates[0], "bytes_per_second": rates[1]},
        "selection": [asdict(row) for row in rows],
        "prefill": [asdict(row) for row in prefills],
    }
    if arguments.json:
        report.write_record(arguments.json, record)
    return record


def show(record: dict[str, Any]) -> None:
    """Prints the tables of a record."""
    rates, rows = record["rates"], [selection.Row(**row) for row in record["selection"]]
    products, copies = rates["products_per_second"] / 1e12, rates["bytes_per_second"] / 1e9
    print(f"measured: matrix products {products:.1f} TFLOP/s, copies {copies:.0f} GB/s")
    print("\nselection, milliseconds per layer (steps: from graph replay)")
    print(selection.table(rows))
    print("\nits steps, milliseconds per layer")
    print(selection.steps_table(rows))
    print("\nprefill to the first token, cache building included")
    print(prefill.table([prefill.Prefill(**row) for row in record["prefill"]]))
