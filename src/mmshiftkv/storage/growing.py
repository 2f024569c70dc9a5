"""Storage that grows with its tokens, for eager decoding."""

from typing import Any

import torch

from .base import Pair, SelectedLayer, Selection, Storage
from .held import HeldLayer

_LEAST_GROWTH = 64  # slots


class GrowingLayer(SelectedLayer):
    """A layer whose storage grows in steps; a prompt is collected in an empty one.

    `keys` and `values` are the stored tokens, (B, H_kv, stored, D): views of the storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self._allocated: Pair | None = None
        self._views: Pair | None = None
        self._dropped = 0

    @classmethod
    def holding(cls, kept: torch.Tensor | None, keys: torch.Tensor, values: torch.Tensor, seen: int) -> "GrowingLayer":
        """A layer with what was kept of a prompt.

        Args:
            kept: (B, H_kv, C) int64, the columns that were kept; None: all.
            keys, values: (B, H_kv, C, D); they become the storage.
            seen: columns of the prompt.
        """
        layer = cls()
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer._hold(keys, values, keys.shape[2])
        layer._kept, layer._dropped = kept, seen - keys.shape[2]
        layer.prompt_stored = keys.shape[2]
        return layer

    @property
    def allocated(self) -> Pair | None:
        """All slots for keys and values, (B, H_kv, slots, D); None before the first token."""
        self._adopt()
        return self._allocated

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self.stored + self._dropped

    @property
    def dropped(self) -> int:
        """Tokens seen but not held."""
        return self._dropped

    @property
    def stored(self) -> int:
        """Tokens held, at most those seen."""
        return 0 if self.keys is None else self.keys.shape[2]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes dtype, device and shape from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._hold(key_states[:, :, :0].detach().clone(), value_states[:, :, :0].detach().clone(), 0)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Appends states (B, H_kv, t, D) and returns all that are stored.

        Raises:
            ValueError: a batch of another size than the one stored.
        """
        if not self.is_initialized:
            return self._begin(key_states, value_states)
        self._adopt()
        self._match_rows(key_states)
        start, length = self.stored, self.stored + key_states.shape[-2]
        self._make_room(length)
        assert self._allocated is not None
        for storage, states in zip(self._allocated, (key_states, value_states), strict=True):
            storage[:, :, start:length] = states.detach()
        self._hold(*self._allocated, length)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _begin(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        """Takes a copy of the first states as the storage."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        keys, values = (one.detach().clone(memory_format=torch.contiguous_format) for one in (key_states, value_states))
        self._hold(keys, values, keys.shape[2])
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen: the position of the next one."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention will see, and how many seen tokens lie before them."""
        return self.stored + query_length, self.dropped

    def _remove(self, count: int) -> None:
        assert self._allocated is not None
        self._hold(*self._allocated, self.stored - count)

    def _hold_rows(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._hold(keys, values, self.stored)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self._allocated = keys, values
        if length < keys.shape[2]:
            keys, values = keys[:, :, :length], values[:, :, :length]
        self._views = self.keys, self.values = keys, values

    def _adopt(self) -> None:
        """Takes keys and values that somebody else has set: kvpress cuts answers off in this way."""
        if self._views is not None and (self.keys is not self._views[0] or self.values is not self._views[1]):
            assert self.keys is not None
            assert self.values is not None
            self._hold(self.keys, self.values, self.keys.shape[2])
            self.prompt_stored = min(self.prompt_stored, self.stored)

    def _make_room(self, length: int) -> None:
        assert self._allocated is not None
        # What was made under inference mode cannot be written outside of it.
        is_locked = self._allocated[0].is_inference() and not torch.is_inference_mode_enabled()
        if length <= self._allocated[0].shape[2] and not is_locked:
            return
        # Exact for what comes first, then in steps of a quarter: no copy of everything for every token.
        capacity = length if self.stored == 0 else length + max(_LEAST_GROWTH, length // 4)
        filled = self.stored
        grown = []
        for part in self._allocated:
            room = part.new_empty((*part.shape[:2], capacity, part.shape[3]))
            room[:, :, :filled] = part[:, :, :filled]
            grown.append(room)
        self._hold(grown[0], grown[1], filled)


class GrowingStorage(Storage):
    """Each layer grows by itself."""

    is_compileable = False

    def check(self) -> None:
        """Nothing: every attention reads it."""

    def take_in(self, index: int, layer: Any) -> Any:
        """The same layer."""
        return layer

    def store(self, index: int, layer: SelectedLayer, selection: Selection) -> SelectedLayer:
        """As in `Storage`: a new layer with the kept tokens, or `layer` itself if it keeps all."""
        if selection.take is None:
            layer.keep_all()
            return layer
        columns, keys, values, refitted = selection.take(None)
        return GrowingLayer.holding(columns, keys, values if refitted is None else refitted, selection.seen)

    def restore(self, index: int, held: HeldLayer) -> SelectedLayer:
        """As in `Storage`."""
        # Contiguous copies: a view would keep the storage of the other layer.
        keys, values = (part.clone(memory_format=torch.contiguous_format) for part in (held.keys, held.values))
        layer = GrowingLayer.holding(held.kept, keys, values, held.seen)
        layer.prompt_stored = held.prompt_stored
        return layer

    def reserve(self, tokens: int) -> None:
        """Nothing: there is always room."""

    def has_room_for(self, tokens: int) -> bool:
        """True."""
        return True

    def release(self) -> None:
        """Nothing: the storage goes with its layers."""
