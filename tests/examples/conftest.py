import pytest
import torch

from common import TINY_MODEL
from tiny_vlm.answering import load


@pytest.fixture(scope="session", autouse=True)
def single_thread():
    """The embedded model is too small for two threads: they wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny():
    """The embedded model in float32, and its processor."""
    return load(TINY_MODEL)
