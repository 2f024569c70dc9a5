import gc
import os

import pytest
import torch

# Triton decides when it is first imported, and transformers imports it: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import models

# The models of the tests are so small that a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vision_case(tmp_path_factory):
    """A function (family, attention) -> VisionCase; what was loaded once is used again."""
    folder = tmp_path_factory.mktemp("checkpoints")
    loaded = {}

    def load(family: str, attention: str = "sdpa") -> models.VisionCase:
        if (family, attention) not in loaded:
            loaded[family, attention] = (
                models.qwen2_5_vl(attention)
                if family == "qwen2_5_vl"
                else models.llava_next(folder / family, family, attention)
            )
        return loaded[family, attention]

    return load


@pytest.fixture
def no_garbage_collection():
    """What is in no cycle goes at once, without it."""
    gc.disable()
    yield
    gc.enable()
