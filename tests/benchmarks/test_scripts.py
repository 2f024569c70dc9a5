"""What all scripts of the benchmarks have in common."""

import subprocess
import sys
from pathlib import Path

import pytest

import common
from benchmarks.quality import compare, share_of_prompt, sinks, variations
from benchmarks.speed import joined, profile_step, speed_and_memory

SCRIPTS = [compare, joined, profile_step, variations, sinks, speed_and_memory]
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    print(stopped.code, *({"torch", "transformers", "mmshiftkv", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.parametrize("script", [*SCRIPTS, share_of_prompt])
def test_help_shows_the_whole_docstring_and_imports_nothing_slow(script, tmp_path):
    command = [sys.executable, "-c", HELP, script.__file__]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "0"
    assert script.__doc__.strip() in run.stdout
    path = Path(script.__file__).relative_to(Path(common.__file__).parents[1])
    assert f"\n    python {path} --" in run.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("package", ["tabulate", "tqdm"])
def test_a_missing_package_is_named(script, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        script.main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f'error: needs {package}: pip install "mmshiftkv[bench]"\n')


@pytest.mark.parametrize("script", [compare, variations, sinks])
@pytest.mark.parametrize("package", ["numpy", "PIL", "rapidfuzz"])
def test_a_missing_package_of_the_questions_is_named(script, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        script.main([])
    assert capsys.readouterr().err.endswith(f'error: needs {package}: pip install "mmshiftkv[bench]"\n')


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script is not profile_step])
def test_a_folder_without_a_model_is_refused_in_one_line(script, tmp_path):
    with pytest.raises(SystemExit, match=r"\Aerror: .*\Z") as stopped:
        script.main(["--model", str(tmp_path), "--device", "cpu"])
    assert str(tmp_path) in str(stopped.value)
    assert "\n" not in str(stopped.value)
