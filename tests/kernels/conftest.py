"""Where the kernels are tested: on a GPU if there is one, otherwise under Triton's interpreter.

The interpreter has to be asked for before Triton is first imported, so `tests/conftest.py` does that.
"""

import pytest
import torch

from shiftkv_kernels.device import is_interpreted


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels can run here."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not is_interpreted():
        pytest.skip("there is no CUDA device, and Triton's interpreter is off (TRITON_INTERPRET=1)")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What is allocated without being set holds NaN or the largest integer: an output that is not written shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
