"""Runs randomised cases against references until it is stopped, and counts.

    PYTHONPATH=tests python tests/soak.py --minutes 60 --seed 0 --record soak.json
    PYTHONPATH=tests python tests/soak.py --resume soak.json --minutes 60
    PYTHONPATH=tests python tests/soak.py --case generate:17

Each case is made from its category and its seed alone.  One that fails is written as a script that repeats it.  Ctrl-C
stops, prints the counts and leaves a record that `--resume` goes on from.
"""

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_TESTS = Path(__file__).resolve().parent
for _folder in ("examples", "tests", "tests/examples", "tests/kernels", "tests/methods"):
    if str(_TESTS.parent / _folder) not in sys.path:
        sys.path.append(str(_TESTS.parent / _folder))

import torch

# Triton decides when it is first imported, and transformers imports it: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tqdm import tqdm

from benchmarks.report import environment
from soak_cases import CATEGORIES
from soak_cases.bench import Bench
from soak_cases.case import Draws, Outcome
from soak_cases.record import Record
from soak_cases.runner import Soak, describe, run_case


def repeat(category: str, seed: int, device: str = "cpu") -> Outcome:
    """Runs one case again; raises what it raises.

    Args:
        category: one of `CATEGORIES`.
        seed: of the case.
        device: where its model runs.
    """
    torch.set_num_threads(1)
    case = CATEGORIES[category].draw(Draws(category, seed))
    print(f"{category}:{seed}", *describe(case), sep="\n  ")
    outcome = run_case(case, seed, Bench(device))
    print(outcome.value)
    return outcome


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="how long to run; without it, until Ctrl-C")
    parser.add_argument("--cases", type=int, help="run so many cases of each category instead")
    parser.add_argument("--seed", type=int, default=0, help="other seeds draw other cases (default: 0)")
    parser.add_argument(
        "--record", type=Path, default=Path("soak.json"), help="file of the counts (default: soak.json)"
    )
    parser.add_argument("--resume", type=Path, metavar="RECORD", help="go on from this record, and write to it")
    parser.add_argument(
        "--failures", type=Path, default=Path("soak_failures"), help="folder of the scripts of failing cases"
    )
    parser.add_argument("--categories", nargs="+", choices=tuple(CATEGORIES), default=list(CATEGORIES), metavar="NAME")
    parser.add_argument("--device", default="cpu", help='where the models run, "cpu" (default) or "cuda"')
    parser.add_argument("--case", metavar="CATEGORY:SEED", help="run one case only")
    return parser.parse_args(arguments)


def soak(options: argparse.Namespace) -> Record:
    """Runs as the command line says; what it counted."""
    bench = Bench(options.device)
    path = options.resume or options.record
    record = Record.load(path) if options.resume else Record(options.seed, environment(bench.device))
    run = Soak({name: CATEGORIES[name] for name in options.categories}, bench, record, path, options.failures)
    end = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    total = options.cases * len(options.categories) if options.cases is not None else None
    with tqdm(total=total, unit="case", smoothing=0.05) as progress:
        try:
            if options.cases is not None:
                run.run_each(options.cases, progress)
            else:
                run.run(lambda _: time.monotonic() < end, progress)
        except KeyboardInterrupt:
            progress.write(f"interrupted; --resume {path} goes on")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the soak; 1 if a case failed."""
    options = parsed(argv)
    faulthandler.enable()
    if options.case:
        category, _, seed = options.case.rpartition(":")
        repeat(category, int(seed), options.device)
        return 0
    torch.set_num_threads(1)
    record = soak(options)
    print(record)
    for failure in record.failures:
        print(f"failed: --case {failure.category}:{failure.seed}")
    return int(bool(record.failures))


if __name__ == "__main__":
    sys.exit(main())
