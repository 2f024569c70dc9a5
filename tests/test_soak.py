"""A few cases of each category of the soak, and the soak itself."""

import runpy
from dataclasses import dataclass

import pytest
import torch
from tqdm import tqdm
from transformers.integrations import sdpa_attention

import models
import soak
from soak_cases import CATEGORIES
from soak_cases.bench import Bench, contiguous_repeat_kv, reads_wrong_masks
from soak_cases.case import Case, Draws, Outcome
from soak_cases.record import Record
from soak_cases.runner import Soak, run_case

SEED = 7_000_000
# So many of each category take about a minute together.
CASES = {"compiled": 3, "kernels": 4, "select_tokens": 8}
MOST_CASES = 15


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture(scope="module")
def bench_on_a_gpu():
    return Bench("cuda")


def run_some(category, cases, bench):
    for seed in range(SEED, SEED + cases):
        case = CATEGORIES[category].draw(Draws(category, seed))
        assert case == CATEGORIES[category].draw(Draws(category, seed))
        try:
            run_case(case, seed, bench)
        except Exception as error:
            error.add_note(f"--case {category}:{seed} --device {bench.device}\n{case}")
            raise


@pytest.mark.parametrize("category", CATEGORIES)
def test_some_cases(category, bench):
    run_some(category, CASES.get(category, MOST_CASES), bench)


@pytest.mark.gpu
@models.requires_gpu
@pytest.mark.parametrize("category", CATEGORIES)
def test_some_cases_on_a_gpu(category, bench_on_a_gpu):
    run_some(category, 1 if category == "compiled" else 5, bench_on_a_gpu)


def test_repeated_kv_heads_are_those_of_transformers_and_stay_them_where_masks_are_read_right():
    states = torch.randn(2, 1, 5, 8)
    repeated = contiguous_repeat_kv(states, 4)
    assert repeated.is_contiguous()
    assert repeated.equal(sdpa_attention.repeat_kv(states, 4))
    assert not reads_wrong_masks(torch.device("cpu"))
    before = sdpa_attention.repeat_kv
    Bench()
    assert sdpa_attention.repeat_kv is before


@dataclass(frozen=True)
class EveryThird(Case):
    """Numbers are not divisible by three."""

    number: int

    @classmethod
    def draw(cls, draws):
        return cls(draws.randrange(1000))

    def run(self, bench):
        assert self.number % 3, f"{self.number} is divisible by three"
        return Outcome.REFUSED if self.number % 2 else Outcome.PASSED


@pytest.fixture
def numbers(monkeypatch):
    """A category whose cases fail now and then: its name, and the outcome of each seed."""
    monkeypatch.setitem(CATEGORIES, "numbers", EveryThird)
    drawn = [EveryThird.draw(Draws("numbers", seed)).number for seed in range(40)]
    return "numbers", drawn


def run(record, folder, cases, *categories):
    with tqdm(disable=True) as progress:
        found = Soak({name: CATEGORIES[name] for name in categories}, Bench(), record, folder / "record.json", folder)
        found.run_each(cases, progress)


def test_a_failing_case_is_written_as_a_script_that_repeats_it(numbers, tmp_path, capsys):
    name, drawn = numbers
    record = Record(0, {})
    run(record, tmp_path, 40, name)
    failing = [seed for seed, number in enumerate(drawn) if number % 3 == 0]
    assert [failure.seed for failure in record.failures] == failing
    assert all(failure.repeats for failure in record.failures)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == sorted(f"numbers_{seed}.py" for seed in failing)
    for seed in failing:
        script = tmp_path / f"numbers_{seed}.py"
        assert f"number = {drawn[seed]}" in script.read_text()
        assert "Expected: Numbers are not divisible by three." in script.read_text()
        with pytest.raises(AssertionError, match=f"{drawn[seed]} is divisible by three"):
            runpy.run_path(str(script))
    assert f"numbers:{failing[0]}" in capsys.readouterr().out


def test_a_record_resumes_where_it_was_left(numbers, tmp_path):
    name, _ = numbers
    whole, halves = Record(0, {"torch": "1"}), Record(0, {"torch": "1"})
    for folder in ("whole", "halves"):
        (tmp_path / folder).mkdir()
    run(whole, tmp_path / "whole", 40, name)
    run(halves, tmp_path / "halves", 13, name)
    resumed = Record.load(tmp_path / "halves" / "record.json")
    assert resumed == halves
    assert resumed.next_seeds == {name: 13}
    run(resumed, tmp_path / "halves", 27, name)
    for record in (whole, resumed):
        record.counts[name].seconds = 0.0
    assert resumed.counts == whole.counts
    assert [failure.seed for failure in resumed.failures] == [failure.seed for failure in whole.failures]
    assert "numbers" in str(resumed)


def test_an_interrupt_leaves_a_record_with_the_case_still_to_run(numbers, tmp_path, monkeypatch):
    name, drawn = numbers
    run_number = EveryThird.run

    def interrupted(self, bench):
        if self.number == drawn[4]:
            raise KeyboardInterrupt
        return run_number(self, bench)

    monkeypatch.setattr(EveryThird, "run", interrupted)
    path = tmp_path / "soak.json"
    options = ["--categories", name, "--failures", str(tmp_path), "--cases"]
    found = soak.soak(soak.parsed([*options, "9", "--record", str(path)]))
    assert found == Record.load(path)
    assert found.cases == found.next_seeds[name] == 4
    monkeypatch.setattr(EveryThird, "run", run_number)
    resumed = soak.soak(soak.parsed([*options, "3", "--resume", str(path)]))
    assert resumed.cases == resumed.next_seeds[name] == 7
    assert resumed == Record.load(path)
