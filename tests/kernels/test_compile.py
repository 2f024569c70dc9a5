import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The shared memory that one program may have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
TILES_UNDER_WAY = 80 * 1024  # of several rows' projections
LEAST_SHARED_MEMORY = 99 * 1024  # of all supported GPUs: that of compute capability 8.6, 8.9 and 12.0


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """By compute capability, what compiling all kernels for it came to."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = str(Path(__file__).with_name("compile_kernels.py"))
    compiling = {
        capability: subprocess.Popen(
            [sys.executable, script, str(capability)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in SHARED_MEMORY
    }
    found = {}
    for capability, process in compiling.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        found[capability] = json.loads(output)
    return found


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_all_kernels_compile_and_fit(reports, capability):
    assert len(reports[capability]) == 64
    shared = {name: kernel["shared"] for name, kernel in reports[capability].items()}
    assert {name: size for name, size in shared.items() if size > SHARED_MEMORY[capability]} == {}


def is_made_by_warpgroups(name):
    """Whether a kernel's products are such that Hopper makes them by warpgroups: of 16 bits, or of TF32 in large tiles.

    A refit is solved by TF32 products whatever the dtype of the values; a mean output and scores are sums of what has
    been multiplied element by element.
    """
    kernel = name.split()[0]
    others = "_mean_output_kernel", "_scores_kernel"
    return kernel.startswith("_solve") or ("16 " in name and kernel not in others)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_products_are_made_by_warpgroups_on_hopper(reports, capability):
    made = {name for name, kernel in reports[capability].items() if kernel["wgmma"]}
    expected = set(filter(is_made_by_warpgroups, reports[capability])) if capability == 90 else set()
    assert made == expected


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_projections_of_several_rows_fit_everywhere_and_are_made_by_matrix_units(reports, capability):
    found = {name: kernel for name, kernel in reports[capability].items() if name.startswith("_project_rows_kernel")}
    assert len(found) == 4
    for name, kernel in found.items():
        # Less would mean that weights are not read ahead.
        # Tiles for warpgroups, which only GPUs with more shared memory have, take some more.
        most = SHARED_MEMORY[capability] if kernel["wgmma"] else LEAST_SHARED_MEMORY
        assert TILES_UNDER_WAY <= kernel["shared"] <= most
        assert (kernel["mma"] or kernel["wgmma"]) == ("bf16" in name)
