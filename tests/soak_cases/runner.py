"""Runs cases one after another, and keeps a record of them."""

import contextlib
import logging
import re
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from .bench import Bench
from .case import Case, Draws, Outcome
from .record import Failure, Record

_SECONDS_BETWEEN_SAVES = 5.0
_CASES_REMEMBERED = 8

_SCRIPT = '''"""{category}:{seed} failed.

Expected: {expected}
Found: {found}
Failed once more, alone and with a model built anew: {repeats}.  Ran before it: {before}.

Run it from the root of the repository: PYTHONPATH=tests python {path}
"""

from soak import repeat

# What was drawn:
{drawn}

repeat("{category}", {seed}, device="{device}")
'''


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Hides the warnings that many drawn settings call for; the messages of refusals are exceptions."""
    loggers = [transformers.logging.get_logger(), logging.getLogger("mmshiftkv")]
    levels = [logger.level for logger in loggers]
    had_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if had_bars:
            transformers.logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run_case(case: Case, seed: int, bench: Bench) -> Outcome:
    """Runs one case; raises what it raises, or AssertionError if it leaves hooks on a model."""
    torch.manual_seed(seed)
    with silenced():
        outcome = case.run(bench)
    assert bench.hooks() == 0, f"{bench.hooks()} hooks were left on the models"
    return outcome


class Soak:
    """Draws and runs cases of some categories, so that each gets the same time.

    Args:
        categories: the classes of cases, by name.
        bench: has the models.
        record: counts, of an earlier run too if that is resumed.
        path: the file of the record.
        failures: the folder for the scripts of cases that fail.
    """

    def __init__(
        self, categories: Mapping[str, type[Case]], bench: Bench, record: Record, path: Path, failures: Path
    ) -> None:
        self._categories = categories
        self._bench = bench
        self._record = record
        self._path = path
        self._failures = failures
        self._before: deque[str] = deque(maxlen=_CASES_REMEMBERED)
        self._saved = 0.0
        for name in categories:
            record.count_of(name)

    def run(self, goes_on: Callable[[Record], bool], progress: tqdm) -> None:
        """Runs cases while `goes_on`; the record is saved then, and when the run is interrupted."""
        try:
            while goes_on(self._record):
                self._run_next(progress)
        finally:
            self._record.save(self._path)

    def run_each(self, cases: int, progress: tqdm) -> None:
        """Runs so many cases of each category."""
        try:
            for name in self._categories:
                for _ in range(cases):
                    self._run_one(name, progress)
        finally:
            self._record.save(self._path)

    def _run_next(self, progress: tqdm) -> None:
        self._run_one(min(self._categories, key=lambda name: self._record.count_of(name).seconds), progress)

    def _run_one(self, name: str, progress: tqdm) -> None:
        record = self._record
        seed = record.take_seed(name)
        record.running = f"{name}:{seed}"
        failures = sum(count.failures for count in record.counts.values())
        progress.set_postfix_str(f"{record.running}, failures: {failures}", refresh=False)
        start = time.perf_counter()
        try:
            outcome = self._outcome(name, seed)
        except KeyboardInterrupt:
            record.give_back_seed(name)
            raise
        record.count_of(name).add(outcome, time.perf_counter() - start)
        self._before.append(record.running)
        progress.update()
        if time.monotonic() > self._saved + _SECONDS_BETWEEN_SAVES or outcome is None:
            record.save(self._path)
            self._saved = time.monotonic()

    def _outcome(self, name: str, seed: int) -> Outcome | None:
        """How the case ended; None: it failed, and what is known of it is in the record and a script."""
        case = self._categories[name].draw(Draws(name, seed))
        try:
            return run_case(case, seed, self._bench)
        except Exception as error:
            found = error
        failure = Failure(
            name,
            seed,
            str(self._bench.device),
            repr(case),
            "".join(traceback.format_exception(found)),
            False,
            list(self._before),
        )
        self._record.failures.append(failure)
        write_script(failure, case, found, self._failures)
        # After a fault on a GPU every later case would fail: this raises then, and ends the soak.
        if self._bench.device.type == "cuda":
            torch.cuda.synchronize()
        failure.repeats = self._fails_again(case, seed)
        write_script(failure, case, found, self._failures)
        return None

    def _fails_again(self, case: Case, seed: int) -> bool:
        self._bench.forget()
        try:
            run_case(case, seed, self._bench)
        except Exception:
            self._bench.forget()
            return True
        return False


def write_script(failure: Failure, case: Case, error: Exception, folder: Path) -> Path:
    """Writes a script that repeats exactly this case."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub('[^a-z0-9]+', '_', failure.category)}_{failure.seed}.py"
    path.write_text(
        _SCRIPT.format(
            category=failure.category,
            seed=failure.seed,
            expected=(type(case).__doc__ or "").strip().splitlines()[0],
            found=_one_line(error),
            repeats="yes" if failure.repeats else "no",
            before=", ".join(failure.before) or "nothing",
            path=path,
            drawn="\n".join(f"#   {line}" for line in describe(case)),
            device=failure.device,
        ),
        encoding="utf-8",
    )
    return path


def describe(case: Case) -> list[str]:
    """The fields of a case, one a line."""
    return [f"{name} = {value!r}" for name, value in vars(case).items()]


def _one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".replace("\\", "/").replace('"""', "'''")
    return " ".join(text.split())[:1000]
