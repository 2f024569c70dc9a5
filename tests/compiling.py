"""Compiled decoding without a compiler."""

from torch._dynamo.utils import counters
from transformers import CompileConfig


def compiling() -> CompileConfig:
    """Traces and guards as on a GPU, and takes no compiler."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    return config


def graphs() -> int:
    """How many graphs have been compiled since the counters were cleared."""
    return counters["stats"]["unique_graphs"]
