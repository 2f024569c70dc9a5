"""Layers whose state has one size: of linear attention and of convolutions."""

import copy
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.cache_utils import LinearAttentionLayer

from .buffers import Buffers


class HasBuffers(Protocol):
    """What a cache holds its states in."""

    @property
    def buffers(self) -> Buffers:
        """Those of the cache."""


class StateLayer(LinearAttentionLayer):
    """A `LinearAttentionLayer` whose states are in a cache's buffers.

    Args:
        index: the layer's number.
        number_of_states: of each kind.
        storage: that of the cache.
    """

    def __init__(self, index: int, number_of_states: int, storage: HasBuffers) -> None:
        super().__init__(number_of_states=number_of_states)
        self._index = index
        # Weak: without a cycle the buffers are free as soon as the cache is.
        self._weak_storage = weakref.ref(storage)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateLayer":
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._weak_storage = weakref.ref(copy.deepcopy(self._storage, memo))
        for name, value in vars(self).items():
            if isinstance(value, dict):
                setattr(copied, name, dict(value))
        copied._change_states(lambda states: states)
        return copied

    @property
    def _storage(self) -> HasBuffers:
        storage = self._weak_storage()
        assert storage is not None
        return storage

    def lazy_initialization(self, *args: Any, state_idx: int = 0, **kwargs: Any) -> None:
        """As in transformers, with zeros in the cache's buffers."""
        super().lazy_initialization(*args, state_idx=state_idx, **kwargs)
        self._change_states(lambda states: states)

    def reset(self) -> None:
        """Not for a layer by itself: RuntimeError.  The cache puts a new layer in its place."""
        raise RuntimeError("call reset() of the cache, not of one of its layers")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the batch rows `beam_idx`, in that order."""
        self._change_states(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times."""
        self._change_states(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Takes the batch rows `indices`: numbers or a boolean mask."""
        self._change_states(lambda states: states[torch.as_tensor(indices, device=states.device)])

    def _change_states(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for kind, held in (("conv", self.conv_states), ("recurrent", self.recurrent_states)):
            for number, states in held.items():
                if states is not None:
                    held[number] = self._storage.buffers.holding((self._index, kind, number), change(states))
