"""Tensor parallelism, as transformers does it: each process holds a part of the model, and some of its heads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Rank:
    """One of the processes that share a model.

    Attributes:
        index: the number of this one, from 0.
        count: how many there are.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"rank {self.index} of {self.count}"


def rank_of(model: nn.Module) -> Rank | None:
    """Which part of a tensor-parallel model this process holds; None: the model is not shared between processes."""
    count, mesh = getattr(model, "_tp_size", None) or 1, getattr(model, "_device_mesh", None)
    if count == 1 or mesh is None:
        return None
    return Rank((mesh["tp"] if mesh.ndim > 1 else mesh).get_local_rank(), count)


def obstacle_of_heads(config: Any, rank: Rank | None) -> str | None:
    """Why the heads of a text model cannot be shared between its processes; None: they can.

    Args:
        config: of the text model.
        rank: of this process.
    """
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if rank is None or not isinstance(heads, int) or heads % rank.count == 0:
        return None
    return (
        f"its {heads} KV heads cannot be shared evenly between {rank.count} processes (tensor parallel), and "
        f"transformers cannot run it so either; the number of processes must divide {heads}"
    )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that is spread over several; any other tensor itself."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


@contextmanager
def with_local_parameters(module: nn.Module) -> Iterator[None]:
    """Has the module's own parameters, not those of its parts, be this process's part of them for a while."""
    spread = {name: one for name, one in module._parameters.items() if hasattr(one, "to_local")}
    module._parameters.update({name: local_part(one) for name, one in spread.items() if one is not None})  # type: ignore[misc]
    try:
        yield
    finally:
        module._parameters.update(spread)
