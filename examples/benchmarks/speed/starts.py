"""What the first call of `generate` costs, and prompts of many lengths after one another, each cache in a new process.

A *cold start* is the time from the first call of `generate` in a process, with a new cache, to its second token: the
prefill, which may compile kernels, and the decoding step, which is compiled.  The process is new, the model is loaded,
and the folders in which Inductor and Triton keep what they have compiled are empty; Python's own files and the drivers'
are as they were.  A step of decoding is recorded as a CUDA graph after the second token, which is not in that time.
"again" is the third call after it, with another new cache; all is compiled and recorded then.

*Prompts* of random lengths, the same at each run, show whether another length is compiled again: the time from the
call to the first token, and what each prompt compiled up to its third.  StaticCache, whose size follows the prompt's,
is compiled at each length and is left out.  Where both are measured, the prompts follow the cold start in its process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import report
from benchmarks.speed.rows import LOOPS, WARMING_UP
from common import errors_in_one_line, fail

SETTINGS = ("model", "random_weights", "dtype", "attn", "caches", "loops", "budgets", "lengths", "new_tokens")


@dataclass(frozen=True)
class ColdStart:
    """One cache; seconds, medians of the processes.

    Attributes:
        cache: its name.
        decoding: "compiled" or "eager".
        tokens, new_tokens: of the prompt, and what the cache has room for besides.
        first_token, second_token: from the call of `generate`.
        fastest, slowest: of the processes, to the second token.
        again: to the second token of the third call after it.
        graphs, kernels: compiled up to the second token.
    """

    cache: str
    decoding: str
    tokens: int
    new_tokens: int
    first_token: float
    second_token: float
    fastest: float
    slowest: float
    again: float
    graphs: int
    kernels: int


@dataclass(frozen=True)
class Prompts:
    """One cache and many prompts; seconds to the first token.

    Attributes:
        cache: its name.
        decoding: "compiled" or "eager".
        first: of the first prompt.
        median, slowest: of those after the first `WARMING_UP`.
        compiled_later: how many of these compiled anything.
        tokens, seconds, graphs, kernels: of each prompt, in order.
    """

    cache: str
    decoding: str
    first: float
    median: float
    slowest: float
    compiled_later: int
    tokens: list[int]
    seconds: list[float]
    graphs: list[int]
    kernels: list[int]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record, which is also written to the file of `--json` after each cache."""
    from benchmarks.speed.decoding_run import fitting_lengths, model_config, model_name

    with errors_in_one_line():  # before any process is started
        arguments.lengths = fitting_lengths(model_config(arguments), arguments)
    names = ("lengths", "budgets", "caches", "new_tokens", "repeats")
    record: dict[str, Any] = {
        "settings": {
            "model": model_name(arguments),
            "dtype": arguments.dtype,
            "attention": arguments.attn,
            **{name: getattr(arguments, name) for name in names},
            "prompts": arguments.prompts_of_different_length,
        },
        "environment": report.environment(arguments.device),
        "cold_starts": [],
        "prompts": [],
    }
    repeats = arguments.repeats if arguments.cold_start else 1
    for name, compiled_by_length in tqdm(_caches(arguments), unit="cache"):
        count = 0 if compiled_by_length else arguments.prompts_of_different_length or 0
        runs = []
        for run in range(repeats if arguments.cold_start or count else 0):
            runs.append(_in_a_fresh_process(arguments, name, 0 if run else count))
        if arguments.cold_start:
            record["cold_starts"].append(asdict(_summary(arguments, name, runs)))
        if count:
            record["prompts"].append(asdict(_of_prompts(name, runs[0])))
        if arguments.json:
            report.write_record(arguments.json, record)
    return record


def _caches(arguments: argparse.Namespace) -> list[tuple[str, bool]]:
    """Names of the caches, and whether they are compiled by length: as `decoding_run.cache_kinds` names them."""
    names = [("DynamicCache", False)] if "dynamic" in arguments.caches else []
    if "static" in arguments.caches:
        names.append(("StaticCache", True))
    if "shiftkv" in arguments.caches:
        for budget in arguments.budgets:
            name = f"ShiftKVCache, budget {budget}"
            names += [(name if loop == LOOPS[0] else f"{name}, {loop}", False) for loop in arguments.loops]
    return names


def _in_a_fresh_process(arguments: argparse.Namespace, cache: str, count: int) -> dict[str, Any]:
    """What fresh_process.py found.

    Raises:
        SystemExit: it failed; with what it says of it in its last line.
    """
    settings = {name: getattr(arguments, name) for name in (*SETTINGS, "cold_start")}
    settings |= {"device": str(arguments.device), "cache": cache, "count": count}
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder, "settings.json"), Path(folder, "results.json")
        given.write_text(json.dumps(settings), encoding="utf-8")
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
            "TRITON_CACHE_DIR": str(Path(folder, "triton")),
        }
        script = Path(__file__).with_name("fresh_process.py")
        command = [sys.executable, str(script), str(given), str(results)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            fail(f"{cache}: {(done.stderr.strip().splitlines() or ['the process ended without a word'])[-1]}")
        found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
        return found


def _summary(arguments: argparse.Namespace, cache: str, runs: Sequence[dict[str, Any]]) -> ColdStart:
    starts = [run["cold_start"] for run in runs]
    second = [start["second_token"] for start in starts]
    return ColdStart(
        cache,
        runs[0]["decoding"],
        max(arguments.lengths),
        arguments.new_tokens,
        first_token=statistics.median(start["first_token"] for start in starts),
        second_token=statistics.median(second),
        fastest=min(second),
        slowest=max(second),
        again=statistics.median(start["again"] for start in starts),
        graphs=max(start["graphs"] for start in starts),
        kernels=max(start["kernels"] for start in starts),
    )


def _of_prompts(cache: str, run: dict[str, Any]) -> Prompts:
    found = run["prompts"]
    later = found["seconds"][WARMING_UP:]
    compiled = [graphs + kernels for graphs, kernels in zip(found["graphs"], found["kernels"], strict=True)]
    return Prompts(
        cache,
        run["decoding"],
        first=found["seconds"][0],
        median=statistics.median(later),
        slowest=max(later),
        compiled_later=sum(number > 0 for number in compiled[WARMING_UP:]),
        **found,
    )


def show(record: dict[str, Any]) -> None:
    """Prints the tables of a record, under what they were measured with."""
    settings, environment = record["settings"], record["environment"]
    print(f"{settings['model']}, {settings['dtype']}, {environment['device']}")
    if record["cold_starts"]:
        print("\nfrom the first call of generate in a new process, folders of compiled code empty; seconds")
        print(_table_of_starts([ColdStart(**row) for row in record["cold_starts"]]))
    if record["prompts"]:
        shortest, longest = min(settings["lengths"]), max(settings["lengths"])
        print(
            f"\n{settings['prompts']} prompts of {shortest:,} to {longest:,} tokens, to the first token; milliseconds"
        )
        print(f"median, slowest and compiled again: of those after the first {WARMING_UP}")
        print(_table_of_prompts([Prompts(**row) for row in record["prompts"]]))


def _table_of_starts(rows: Sequence[ColdStart]) -> str:
    header = ["cache", "decoding", "tokens", "first token", "second token", "(min - max)", "again", "graphs", "kernels"]
    cells = [
        [
            *(row.cache, row.decoding, f"{row.tokens:,}", f"{row.first_token:.2f}", f"{row.second_token:.2f}"),
            *(f"({row.fastest:.2f} - {row.slowest:.2f})", f"{row.again:.2f}", str(row.graphs), str(row.kernels)),
        ]
        for row in rows
    ]
    return report.table(header, cells, left=("cache", "decoding"))


def _table_of_prompts(rows: Sequence[Prompts]) -> str:
    header = ["cache", "decoding", "first", "median", "slowest", "compiled again"]
    cells = [
        [
            *(row.cache, row.decoding, f"{1e3 * row.first:.1f}", f"{1e3 * row.median:.1f}"),
            *(f"{1e3 * row.slowest:.1f}", str(row.compiled_later)),
        ]
        for row in rows
    ]
    return report.table(header, cells, left=("cache", "decoding"))
