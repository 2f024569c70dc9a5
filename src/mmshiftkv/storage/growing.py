"""Storage that grows with its tokens, for eager decoding."""

from typing import Any

import torch

from shiftkv_kernels import gather

from .base import Pair, SelectedLayer, Selection, Storage

_LEAST_GROWTH = 64  # slots


class GrowingLayer(SelectedLayer):
    """A layer whose storage grows in steps; a prompt is collected in an empty one.

    `keys` and `values` are the stored tokens, (B, H_kv, stored, D): views of the storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self._allocated: Pair | None = None
        self._seen = 0

    @classmethod
    def holding(cls, kept: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: int) -> "GrowingLayer":
        """A layer with what was kept of a prompt.

        Args:
            kept: (B, H_kv, C) int64, the columns that were kept.
            keys, values: (B, H_kv, C, D); they become the storage.
            seen: columns of the prompt.
        """
        layer = cls()
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer._hold(keys, values, keys.shape[2])
        layer._kept, layer._seen = kept, seen
        layer.prompt_stored = keys.shape[2]
        return layer

    @property
    def allocated(self) -> Pair | None:
        """All slots for keys and values, (B, H_kv, slots, D); None before the first token."""
        return self._allocated

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self._seen

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
            self.lazy_initialization(key_states, value_states)
        self._check_rows(key_states)
        start, length = self.stored, self.stored + key_states.shape[-2]
        self._make_room(length)
        assert self._allocated is not None
        for storage, states in zip(self._allocated, (key_states, value_states), strict=True):
            storage[:, :, start:length] = states.detach()
        self._hold(*self._allocated, length)
        self._seen += key_states.shape[-2]
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens seen: the position of the next one."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention will see, and how many seen tokens lie before them."""
        return self.stored + query_length, self.dropped

    def _remove(self, count: int) -> None:
        assert self._allocated is not None
        self._hold(*self._allocated, self.stored - count)
        self._seen -= count

    def _hold_rows(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._hold(keys, values, self.stored)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self._allocated = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def _make_room(self, length: int) -> None:
        assert self._allocated is not None
        if length <= self._allocated[0].shape[2]:
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
    """Each layer grows by itself.

    Args:
        backend: "auto", "triton" or "torch".
    """

    is_compileable = False

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def check(self) -> None:
        """Nothing: every attention reads it."""

    def store(self, index: int, layer: SelectedLayer, selection: Selection) -> SelectedLayer:
        """As in `Storage`: a new layer with the kept tokens, or `layer` itself if it keeps all."""
        kept = selection.kept
        if kept is None:
            layer.keep_all()
            return layer
        keys, values = gather(selection.keys, selection.values, kept, backend=self._backend)
        if selection.refitted is not None:
            values = selection.refitted
        return GrowingLayer.holding(kept, keys, values, selection.seen)

    def reserve(self, tokens: int) -> None:
        """Nothing: there is always room."""

    def release(self) -> None:
        """Nothing: the storage goes with its layers."""
