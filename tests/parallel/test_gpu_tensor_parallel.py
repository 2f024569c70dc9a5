"""On two GPUs with NCCL: the example gives one process's tokens, decoded as they come and ahead, compiled."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensor_parallel.py"
SECONDS = 300
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("options", [[], ["--decode-ahead"], ["--preset", "value-aware"]])
def test_the_tokens_are_those_of_one_process(options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    done = subprocess.run(
        [*command, *options, "--budget", "128"], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes, nccl" in done.stdout
    assert "full cache: the same tokens" in done.stdout
    assert "compressed cache: the same tokens" in done.stdout
