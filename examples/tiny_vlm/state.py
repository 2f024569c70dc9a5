"""The state of a training, from which `--resume` goes on: weights, the optimizer's moments, and where the run stood.

Weights are written in float32, the moments in bfloat16, 8 bytes a parameter together, into files of at most 15 MB, so
that the state passes where large files do not. A resumed run is therefore the same up to the rounding of the moments.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from tiny_vlm.step import Step

LARGEST_FILE = 15_000_000  # bytes
RECORD = "record.json"
MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}  # our words for those of torch.optim.AdamW


@dataclass
class Record:
    """Where a training stands."""

    model: str  # name of the architecture
    steps: int = 0
    images: int = 0
    seconds: float = 0.0  # training time that counts for the schedule, over all runs
    runs: int = 0


def tensors_of(step: "Step") -> Iterator[tuple[str, Tensor]]:
    """Weights and moments by name; parameters that the training does not use have no moments."""
    for name, parameter in step.named_parameters.items():
        yield f"weight/{name}", parameter.detach()
        if moments := step.optimizer.state.get(parameter):
            for word, key in MOMENTS.items():
                yield f"{word}/{name}", moments[key].to(torch.bfloat16)


def save_state(folder: Path, step: "Step", record: Record) -> None:
    """Writes the state into a folder of its own, in place of an earlier one."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    file: dict[str, Tensor] = {}
    number = size = 0
    for name, tensor in tensors_of(step):
        if file and size + tensor.nbytes > LARGEST_FILE:
            save_file(file, unfinished / f"state-{number}.safetensors")
            file, number, size = {}, number + 1, 0
        file[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    save_file(file, unfinished / f"state-{number}.safetensors")
    (unfinished / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def load_record(folder: Path, model: str) -> Record:
    """Where the training in this folder stands; raises ValueError when it is another model's."""
    record = Record(**json.loads((folder / RECORD).read_text()))
    if record.model != model:
        raise ValueError(f"--model is {model!r}, but {str(folder)!r} holds the training of {record.model!r}")
    return record


@torch.no_grad()
def load_state(folder: Path, step: "Step", record: Record) -> None:
    """Puts weights and moments into place; raises ValueError when they are not those of this model."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        tensors |= load_file(path)
    names = {name.partition("/")[2] for name in tensors}
    if names != set(step.named_parameters):
        raise ValueError(
            f"{str(folder)!r} holds other weights: {sorted(names ^ set(step.named_parameters))[:4]} differ"
        )
    for name, parameter in step.named_parameters.items():
        parameter.copy_(tensors[f"weight/{name}"])
        if f"first/{name}" in tensors:
            on_device = parameter.device if step.optimizer.defaults["capturable"] else "cpu"
            step.optimizer.state[parameter] = {"step": torch.tensor(float(record.steps), device=on_device)} | {
                key: tensors[f"{word}/{name}"].to(parameter) for word, key in MOMENTS.items()
            }
