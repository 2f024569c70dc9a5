"""An evaluation in several processes gives the record of one, and ends with the first that fails."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.processes import Processes, launched
from benchmarks.quality import compare

EXAMPLES = Path(compare.__file__).parents[2]
CPU = torch.device("cpu")
FAILS = """
import torch

from benchmarks.processes import launched
from common import errors_in_one_line

with errors_in_one_line(), launched(torch.device("cpu")) as processes:
    if processes.index == 1:
        raise ValueError("page 7 cannot be read")
    processes.gather([(0, "an answer")])
    print("never here")
"""


def launch(script, *arguments):
    """What a script writes and how it ends, in two processes; without a GPU `--multi_gpu` is what starts two."""
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    paths = os.pathsep.join([str(EXAMPLES), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [*command, str(script), *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


def test_two_processes_write_and_show_what_one_does(tmp_path, capsys):
    # Of each task a batch of two for the main process, and one of one for the other.
    options = "--device cpu --count 3 --batch-size 2 --tasks lookup line --methods shiftkv --budgets 24"
    arguments = [*options.split(), "--builtin-font-only", "--json"]
    done = launch(compare.__file__, *arguments, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    compare.main([*arguments, str(tmp_path / "one.json")])
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert done.stdout == capsys.readouterr().out
    assert "8/8 " in done.stderr  # one bar, of the main process: four questions, two setups
    assert "4/4 " not in done.stderr


def test_a_process_that_fails_ends_all_with_its_message(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS, encoding="utf-8")
    done = launch(script)
    assert done.returncode != 0
    assert "error: page 7 cannot be read" in done.stderr
    assert done.stdout == ""


def test_all_pieces_are_done_once_and_come_back_in_order():
    several = [Processes(index, 3) for index in range(3)]
    assert [sum(one.does(number) for one in several) for number in range(7)] == [1] * 7
    assert [one.is_main for one in several] == [True, False, False]
    assert Processes().gather([(2, "c"), (0, "a"), (1, "b"), (0, "d")]) == ["a", "d", "b", "c"]


def test_without_a_launcher_a_process_is_alone_and_needs_no_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with launched(CPU) as processes:
        assert processes == Processes(0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    with pytest.raises(argparse.ArgumentTypeError, match="needs accelerate: pip install"), launched(CPU):
        pass
