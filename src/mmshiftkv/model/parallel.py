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


@dataclass(frozen=True)
class SharedHeads:
    """The KV heads of a model, as far as they are shared between processes.

    Attributes:
        count: how many the model has; None: its config names no number that holds for all layers.
        rank: of this process; None: there is but one.
    """

    count: int | None
    rank: Rank | None

    @classmethod
    def of(cls, config: Any, rank: Rank | None) -> "SharedHeads":
        """Those of a text model with this config."""
        count = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        return cls(count if isinstance(count, int) else None, rank)

    @property
    def obstacle(self) -> str | None:
        """Why they cannot be shared; None: they can."""
        if self.rank is None or self.count is None or self.count % self.rank.count == 0:
            return None
        return (
            f"its {self.count} KV heads cannot be shared evenly between {self.rank.count} processes (tensor parallel), "
            f"and transformers cannot run it so either; the number of processes must divide {self.count}"
        )

    def place(self, held: int) -> tuple[int, int]:
        """Which of a layer's heads this process holds.

        Args:
            held: how many it holds.

        Returns:
            The number of the first one, and how many heads all processes hold together.
        """
        # Some plans gather what they project, so that each process holds all heads.
        if self.rank is None or held * self.rank.count != self.count:
            return 0, held
        return self.rank.index * held, self.count


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
