"""Where the tensors of a recorded run lie when it is repeated: in those that are given, or in one piece of memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

_ALIGNMENT = 256  # bytes, in the workspace: at least that of any tensor of its own, as far as kernels look


class Place(NamedTuple):
    """A tensor as a part of one of the bases.

    Attributes:
        base: 0 for the workspace, else 1 + the number of the given tensor.
        offset: in bytes.
        like: a tensor of its shape, strides and dtype without memory; None if it is all of the base.
    """

    base: int
    offset: int
    like: torch.Tensor | None

    def part_of(self, bases: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The tensor in other bases."""
        base = bases[self.base]
        assert base is not None
        if self.like is None:
            return base
        like = self.like
        if base.dtype != like.dtype:
            base = base.view(like.dtype)
        start = base.storage_offset() + self.offset // like.element_size()
        return base.as_strided(like.shape, like.stride(), start)


class Workspace:
    """Places for tensors: those that were made in a run share memory if one is used after the other.

    Args:
        given: what is there besides the workspace: the same tensor may be in it twice.
        made: in the run.
        uses: for each step of the run, the tensors that it was given.

    Attributes:
        bytes: of the workspace.
    """

    def __init__(
        self,
        given: Sequence[torch.Tensor | None],
        made: Sequence[torch.Tensor],
        uses: Sequence[Sequence[torch.Tensor]],
    ) -> None:
        # By address of a storage: the base, the offset in it, and the address that both are of.
        self._storages: dict[int, tuple[int, int, int]] = {}
        self._whole: dict[int, tuple[int, torch.Tensor]] = {}
        for base, tensor in enumerate(given, start=1):
            if tensor is not None:
                self._whole.setdefault(tensor.data_ptr(), (base, tensor))
                self._storages.setdefault(tensor.untyped_storage().data_ptr(), (base, 0, tensor.data_ptr()))
        sizes = {}
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages:
                sizes[storage.data_ptr()] = storage.nbytes()
        self.bytes = 0
        for address, offset in _packed(sizes, uses).items():
            self._storages[address] = 0, offset, address
            self.bytes = max(self.bytes, offset + _aligned(sizes[address]))

    def find(self, tensor: torch.Tensor) -> Place:
        """Where a tensor of the run lies.

        Raises:
            LookupError: it was neither given nor made.
        """
        address = tensor.data_ptr()
        if address in self._whole:
            base, whole = self._whole[address]
            return Place(base, 0, None if _is_like(tensor, whole) else _without_memory(tensor))
        base, offset, start = self._storages[tensor.untyped_storage().data_ptr()]
        return Place(base, offset + address - start, _without_memory(tensor))


def _packed(sizes: dict[int, int], uses: Sequence[Sequence[torch.Tensor]]) -> dict[int, int]:
    """Offsets by address of a storage; two overlap only if the last use of one is before the first use of the other."""
    steps: dict[int, list[int]] = {}
    for step, tensors in enumerate(uses):
        for tensor in tensors:
            steps.setdefault(tensor.untyped_storage().data_ptr(), []).append(step)
    placed: dict[int, int] = {}
    for address in sorted(sizes.keys() & steps.keys(), key=lambda one: -sizes[one]):
        beside = sorted(
            (placed[other], placed[other] + _aligned(sizes[other]))
            for other in placed
            if steps[other][0] <= steps[address][-1] and steps[address][0] <= steps[other][-1]
        )
        offset = 0
        for start, end in beside:
            if start - offset >= sizes[address]:
                break
            offset = max(offset, end)
        placed[address] = offset
    return placed


def _aligned(size: int) -> int:
    return -(size // -_ALIGNMENT) * _ALIGNMENT


def _is_like(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.dtype == other.dtype and tensor.shape == other.shape and tensor.stride() == other.stride()


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
