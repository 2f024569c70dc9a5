"""Which versions the script versions.py installs, and what it says of them."""

import subprocess
import sys
import tomllib

import pytest

import versions


def project():
    with (versions.ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def test_the_oldest_versions_are_all_lower_bounds():
    pins = versions.lower_bounds(project(), "dev")
    assert {requirement.replace(">=", "==") for requirement in project()["dependencies"]} <= set(pins)
    assert [pin.split("==")[0] for pin in pins].count("pytest") == 1
    assert any(pin.startswith("torchvision==") for pin in pins)  # of an extra that an extra asks for
    assert not any(pin.startswith(("lmms-eval", "flash-attn", "mmshiftkv")) for pin in pins)


@pytest.mark.parametrize("requirement", ["torch<3", "torch>=2,<3", "torch>=2; python_version > '3'"])
def test_a_requirement_that_is_not_understood_is_refused(requirement):
    with pytest.raises(ValueError, match=r"is not understood; write name>=version"):
        versions.lower_bounds(
            {"name": "it", "dependencies": [requirement], "optional-dependencies": {"dev": []}}, "dev"
        )


def test_the_newest_versions_are_what_pip_resolves():
    (arguments,) = versions.requirements("newest")
    assert not any("==" in argument for argument in arguments)


def test_the_table_has_a_line_for_each_environment():
    results = [
        versions.Result("oldest", ("2.11.0", "5.17.0", "3.6.0", "2.3.5"), "3 failed, 9 passed in 1.20s", 1, 61.4),
        versions.Result("newest", ("2.15.0", "5.24.0", "3.9.0", "2.4.6"), "12 passed in 1.10s", 0, 7.0),
    ]
    assert versions.table(results).splitlines() == [
        "versions  torch   transformers  triton  numpy  time  result",
        "oldest    2.11.0  5.17.0        3.6.0   2.3.5  61 s  3 failed, 9 passed in 1.20s",
        "newest    2.15.0  5.24.0        3.9.0   2.4.6  7 s   12 passed in 1.10s",
    ]


def test_help_says_how_it_is_called():
    shown = subprocess.run([sys.executable, versions.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "python tests/versions.py --oldest tests/upstream -x" in shown.stdout
