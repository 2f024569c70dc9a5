import pytest

from common import TINY_MODEL
from tiny_vlm.answering import load


@pytest.fixture(scope="session")
def tiny():
    """The embedded model in float32, and its processor."""
    return load(TINY_MODEL)
