"""Storage of one layer: the kept prompt tokens and everything that came after them."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ..model.hooks import LayerInput

_LEAST_GROWTH = 64  # slots


class GrowingLayer(DynamicLayer):
    """A layer that holds fewer tokens than it has seen.

    `cumulative_length` counts the tokens seen, which positions follow; `keys` and `values` hold the stored ones, (B,
    H_kv, stored, D), as views of storage that grows in steps.

    Attributes:
        prompt_stored: how many of the stored tokens belong to the selected prompt.
        pending: whether the prompt is still being collected; then nothing has been dropped yet.
        summary: what the method has of the tokens collected so far.
        tail: the last inputs, not yet in the summary: while assisted decoding records, the last of its tokens may
            be taken back.
        record_past: set by transformers while assisted decoding runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.is_initialized = False
        self.storage: tuple[torch.Tensor, torch.Tensor] | None = None
        self._kept: torch.Tensor | None = None
        self.cumulative_length = 0
        self.prompt_stored = 0
        self.pending = False
        self.summary: Any = None
        self.tail: LayerInput | None = None
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keeps the selection from happening before the first `crop`, if it has not happened yet."""
        self.record_past = True

    @property
    def in_prompt(self) -> bool:
        """Whether the next tokens belong to the prompt."""
        return self.pending or self.cumulative_length == 0

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    @property
    def stored(self) -> int:
        """Tokens held, at most those seen."""
        return self.states[0].shape[-2] if self.is_initialized else 0

    @property
    def dropped(self) -> int:
        """Tokens seen but not held."""
        return self.seen - self.stored

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored keys and values, (B, H_kv, stored, D)."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, in all rows and KV heads."""
        return sum(part[:, :, :1].nbytes for part in self.storage) if self.storage else 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the storage, slots not yet filled included."""
        return sum(part.nbytes for part in self.storage) if self.storage else 0

    @property
    def kept_indices(self) -> torch.Tensor | None:
        """(B, H_kv, kept) int64: the prompt's columns that are held, ascending; None before the selection."""
        if self.in_prompt or not self.is_initialized:
            return None
        if self._kept is not None:
            return self._kept
        everything = torch.arange(self.prompt_stored, device=self.device)
        assert self.keys is not None
        return everything.expand(*self.keys.shape[:2], -1).clone()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes dtype, device and shape from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._hold(key_states[:, :, :0].detach().clone(), value_states[:, :, :0].detach().clone(), 0)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states (B, H_kv, t, D) and returns all that are stored.

        Raises:
            ValueError: a batch of another size than the one stored.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_rows(key_states)
        start, count = self.stored, key_states.shape[-2]
        self._make_room(start + count)
        assert self.storage is not None
        for storage, states in zip(self.storage, (key_states, value_states), strict=True):
            storage[:, :, start : start + count] = states.detach()
        self._hold(*self.storage, start + count)
        self.cumulative_length += count
        return self.states

    def _check_rows(self, key_states: torch.Tensor) -> None:
        assert self.keys is not None
        rows = self.keys.shape[0]
        if key_states.shape[0] != rows:
            raise ValueError(
                f"key_states has batch size {key_states.shape[0]}, the cache holds {rows} rows; "
                "call reset() before another prompt"
            )

    def collect(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends prompt states that are to be selected from later, and returns all collected so far."""
        self.pending = True
        return self.update(key_states, value_states)

    def keep_all(self) -> None:
        """Ends the prompt with everything that was stored of it."""
        self._end_prompt()

    def keep_selection(self, kept: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        """Ends the prompt with a selection in place of whatever was stored.

        Args:
            kept: (B, H_kv, C) int64, the columns that were kept.
            keys, values: (B, H_kv, C, D).
            seen: columns of the prompt.
        """
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._kept = kept
        self._hold(keys, values, kept.shape[-1])
        self.cumulative_length = seen
        self._end_prompt()

    def _end_prompt(self) -> None:
        self.prompt_stored = self.stored
        self.pending = False
        self.summary = self.tail = None

    def get_seq_length(self) -> int:
        """Tokens seen: the position of the next one."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention will see, and how many seen tokens lie before them."""
        return self.stored + query_length, self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is their number, negative, as in transformers.

        Raises:
            ValueError: it is positive, or reaches into a prompt from which tokens have been dropped.
        """
        count = self.check_crop(tokens_to_remove)
        if count == 0 or not self.is_initialized:
            return
        assert self.storage is not None
        self._hold(*self.storage, self.stored - count)
        self.cumulative_length -= count
        self.prompt_stored = min(self.prompt_stored, self.stored)

    def check_crop(self, tokens_to_remove: int) -> int:
        """The number of tokens that `crop` would remove; raises as `crop` does and changes nothing."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} must be negative (the number of tokens) or 0")
        fixed = self.prompt_stored if self.dropped else 0
        removable = self.stored - fixed
        if -tokens_to_remove > removable:
            reason = "the prompt before them is compressed" if fixed else "no more are stored"
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: only {removable} tokens can be removed, {reason}")
        return -tokens_to_remove

    def reset(self) -> None:
        """Empties the layer."""
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the batch rows `beam_idx`, in that order."""
        if self.is_initialized:
            self._map_rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times."""
        if self.is_initialized:
            self._map_rows(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Takes the batch rows `indices`: numbers or a boolean mask."""
        if self.is_initialized:
            self._map_rows(lambda part: part[indices.to(part.device) if torch.is_tensor(indices) else indices])

    def _map_rows(self, change: Any) -> None:
        assert self.storage is not None
        length = self.stored
        self._hold(change(self.storage[0]), change(self.storage[1]), length)
        if self._kept is not None:
            self._kept = change(self._kept)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self.storage = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def _make_room(self, length: int) -> None:
        assert self.storage is not None
        if length <= self.storage[0].shape[2]:
            return
        # Exact for a prompt, in steps of a quarter behind it: no copy of everything for every token.
        capacity = length if self.stored == 0 else length + max(_LEAST_GROWTH, length // 4)
        filled = self.stored
        grown = []
        for part in self.storage:
            room = part.new_empty((*part.shape[:2], capacity, part.shape[3]))
            room[:, :, :filled] = part[:, :, :filled]
            grown.append(room)
        self._hold(grown[0], grown[1], filled)
