"""What one decoder block sees of a cache: the storage of its own layer, in a form that is the same for all layers."""

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..storage.base import Pair
from ..storage.buffers import Lengths
from ..storage.states import StateLayer
from ..storage.static import StaticLayer
from ..storage.windows import WindowLayer


class BlockSlots(DynamicLayer):
    """Slots of one layer, for steps of one token.

    Compiled code is guarded by what it reads, and buffers of a cache by their identity: so this holds aliases of them.

    Args:
        layer: the layer of the cache; a window must be fixed.
    """

    is_compileable = True

    def __init__(self, layer: StaticLayer | WindowLayer) -> None:
        super().__init__()
        self.keys, self.values = (part.detach() for part in layer.allocated)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self._filled, self._seen = layer.filled.detach(), layer.get_seq_length().detach()
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Writes states (B, H_kv, 1, D) behind the stored ones and returns all slots; the lengths stay as they are."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        place = self._filled.view(1)
        keys.index_copy_(2, place, key_states)
        values.index_copy_(2, place, value_states)
        return keys, values

    def get_seq_length(self) -> Any:
        """Tokens seen, 0-d int64."""
        return self._seen


def block_cache(layer: Any) -> Cache:
    """A cache of one layer, number 0, that reads and writes what a layer of a cache of this package holds."""
    if not isinstance(layer, StateLayer):
        return Cache(layers=[BlockSlots(layer)])
    alias = copy.copy(layer)
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        setattr(alias, name, {key: None if held is None else held.detach() for key, held in states.items()})
    return Cache(layers=[alias])


def is_fixed(layer: Any) -> bool:
    """Whether a layer's storage stays where it is while single tokens come."""
    if isinstance(layer, WindowLayer):
        return layer.lengths is not None
    return isinstance(layer, (StaticLayer, StateLayer))


def lengths_of(layers: list[Any]) -> list[Lengths]:
    """The lengths of all these layers, each once."""
    held = [layer.lengths for layer in layers if isinstance(layer, (StaticLayer, WindowLayer))]
    return [*{id(lengths): lengths for lengths in held if lengths is not None}.values()]


def tensors_of(layers: list[Any]) -> list[torch.Tensor]:
    """All that a step reads and writes of these layers."""
    found = []
    for layer in layers:
        if isinstance(layer, StateLayer):
            held = (*layer.conv_states.values(), *layer.recurrent_states.values())
            found += [states for states in held if states is not None]
        else:
            found += [*layer.allocated, layer.filled, layer.get_seq_length()]
    return found
