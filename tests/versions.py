"""Runs the tests on the oldest and on the newest versions that pyproject.toml allows.

    python tests/versions.py                              # both, in fresh environments that are removed
    python tests/versions.py --oldest tests/upstream -x   # what follows goes to pytest
    python tests/versions.py --environments ~/versions    # environments that are kept and used again

Both run on the Python that runs this script.  The oldest versions are the lower bounds of the dependencies and of the
extra `dev`, the newest what pip resolves.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRA = "dev"
# Below the lower bounds: Triton's interpreter takes numpy 2.4 from 3.7 on, and the oldest torch brings Triton 3.6.
BELOW = {"numpy": "numpy<2.4"}
SHOWN = ("torch", "transformers", "triton", "numpy")


@dataclass(frozen=True)
class Result:
    """What came of one environment: its versions, the last line of pytest, its exit code, and how long it took."""

    name: str
    versions: tuple[str, ...]
    summary: str
    code: int
    seconds: float


def lower_bounds(project: dict, extra: str) -> list[str]:
    """The requirements of a project and of one of its extras, each at its lower bound: `name==version`."""
    extras = project.get("optional-dependencies", {})
    wanted, pins = [*project["dependencies"], *extras[extra]], {}
    while wanted:
        requirement = wanted.pop(0)
        match = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?(?:>=([\w.]+))?", requirement)
        if match is None:
            raise ValueError(f"pyproject.toml: {requirement!r} is not understood; write name>=version")
        name, extras_of_it, version = match.groups()
        if name == project["name"]:
            wanted += [each for extra_of_it in extras_of_it.split(",") for each in extras[extra_of_it]]
        elif version is not None:
            pins[name] = f"{name}=={version}"
    return list(pins.values())


def requirements(name: str) -> list[list[str]]:
    """The arguments of each `pip install`, in order."""
    project = ["-e", f"{ROOT}[{EXTRA}]"]
    if name == "newest":
        return [["--upgrade", "--upgrade-strategy", "eager", *project]]
    with (ROOT / "pyproject.toml").open("rb") as file:
        pins = lower_bounds(tomllib.load(file)["project"], EXTRA)
    # By itself and afterwards: together with the project pip would refuse it.
    return [[*pins, *project], list(BELOW.values())]


def say(name: str, step: str) -> None:
    """A line of progress."""
    print(f"[{name}] {step}", flush=True)


def make_environment(name: str, folder: Path) -> Path:
    """The Python of an environment that has the project installed; made if it is not there."""
    python = folder / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        say(name, f"making an environment in {folder / name}")
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
    for arguments in requirements(name):
        say(name, f"pip install {' '.join(arguments)}")
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments], check=True
        )
    return python


def installed(python: Path) -> tuple[str, ...]:
    """The versions that are shown in the table."""
    program = f"from importlib.metadata import version\nfor name in {SHOWN}: print(version(name))"
    return tuple(subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.split())


def run_tests(name: str, python: Path, arguments: list[str]) -> Result:
    """Runs pytest, and shows what it prints while it runs."""
    versions = installed(python)
    say(
        name, "pytest on " + ", ".join(f"{package} {version}" for package, version in zip(SHOWN, versions, strict=True))
    )
    # What is installed is tested, not what a path of the caller's leads to.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    begin, summary = time.monotonic(), "nothing printed"
    with subprocess.Popen(
        [python, "-m", "pytest", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            summary = line.strip("= \n") or summary
    return Result(name, versions, summary, process.returncode, time.monotonic() - begin)


def table(results: list[Result]) -> str:
    """One line for each environment."""
    rows = [("versions", *SHOWN, "time", "result")]
    rows += [(each.name, *each.versions, f"{each.seconds:.0f} s", each.summary) for each in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@contextlib.contextmanager
def folder_of(environments: Path | None) -> Iterator[Path]:
    """Where the environments are: the given folder, or one that is removed at the end."""
    if environments is not None:
        environments.mkdir(parents=True, exist_ok=True)
        yield environments.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="mmshiftkv-versions-") as folder:
        yield Path(folder)


def main(words: list[str] | None = None) -> int:
    """Returns 0 if all tests passed on all versions."""
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--oldest", action="store_true", help="the oldest versions only")
    parser.add_argument("--newest", action="store_true", help="the newest versions only")
    parser.add_argument("--environments", type=Path, help="folder whose environments are kept and used again")
    options, arguments = parser.parse_known_args(words)
    names = [name for name in ("oldest", "newest") if getattr(options, name)] or ["oldest", "newest"]
    with folder_of(options.environments) as folder:
        results = [run_tests(name, make_environment(name, folder), arguments) for name in names]
    print(f"\n{table(results)}")
    return max(result.code for result in results)


if __name__ == "__main__":
    sys.exit(main())
