"""A layer after its prompt, in storage of a fixed size: what a compiled decoding step sees."""

import copy
from typing import Any

import torch

from .buffers import Buffers
from .growing import GrowingLayer


class StaticLayer(GrowingLayer):
    """Takes the place of a `GrowingLayer` once its prompt has been selected from, until `reset`.

    `keys` and `values` are the whole storage, (B, H_kv, slots, D); attention is masked where nothing has been written
    yet.  `update` depends on no number that changes from prompt to prompt, so it is compiled once.

    Args:
        index: the layer's number.
        storage: of all layers of the cache.
        states: its buffers for this layer, with the kept tokens in front and zeros behind them.
        kept: (B, H_kv, C) int64, the columns that were kept; None: all.
        stored: C.
        seen: columns of the prompt.
        is_last: whether no selected layer comes after this one.
    """

    is_compileable = True

    def __init__(
        self,
        index: int,
        storage: Buffers,
        states: tuple[torch.Tensor, torch.Tensor],
        kept: torch.Tensor | None,
        *,
        stored: int,
        seen: int,
        is_last: bool,
    ) -> None:
        super().__init__()
        self._index = index
        self._shared = storage
        self._is_last = is_last
        self._kept = kept
        self._dropped = seen - stored
        self.prompt_stored = stored
        self.is_initialized = True
        self._take(states)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StaticLayer":
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._shared = copy.deepcopy(self._shared, memo)
        copied._kept = copy.deepcopy(self._kept, memo)
        copied._take(copied._shared.buffers(self._index, *self._states(), self.slots))
        return copied

    def _take(self, states: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.storage = states
        self.keys, self.values = states
        self.dtype, self.device = states[0].dtype, states[0].device

    @property
    def in_prompt(self) -> bool:
        """False: the prompt has ended."""
        return False

    @property
    def slots(self) -> int:
        """Tokens that there is room for."""
        assert self.keys is not None
        return self.keys.shape[2]

    @property
    def filled(self) -> torch.Tensor:
        """Tokens held, 0-d int64: the slot that the next one is written to."""
        return self._shared.filled

    @property
    def stored(self) -> int:
        """Tokens held; waits for the device."""
        return int(self._shared.filled)

    @property
    def seen(self) -> int:
        """Tokens seen; waits for the device."""
        return int(self._shared.seen)

    @property
    def dropped(self) -> int:
        """Tokens seen but not held."""
        return self._dropped

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes states (B, H_kv, t, D) behind the stored ones and returns the whole storage.

        Raises:
            ValueError: a batch of another size than the one stored.
        """
        self._check_rows(key_states)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        tokens = key_states.shape[-2]
        places = self._shared.filled + torch.arange(tokens, device=key_states.device)
        keys.index_copy_(2, places, key_states.detach())
        values.index_copy_(2, places, value_states.detach())
        if self._is_last:
            self._shared.advance(tokens)
        return keys, values

    def get_seq_length(self) -> Any:
        """Tokens seen, the position of the next one: a 0-d tensor, as in transformers' `StaticLayer`."""
        return self._shared.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention will see, and how many seen tokens lie before them."""
        return self.slots, self._dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, but not all; `tokens_to_remove` is their number, negative.

        Raises:
            ValueError: it is positive, or reaches into a prompt from which tokens have been dropped.
        """
        count = self.check_crop(tokens_to_remove)
        if count == 0:
            return
        self.prompt_stored = min(self.prompt_stored, self.stored - count)
        if self._is_last:
            self._shared.take_back(count)

    def check_crop(self, tokens_to_remove: int) -> int:
        """The number of tokens that `crop` would remove; raises as `crop` does and changes nothing."""
        return super().check_crop(tokens_to_remove) if tokens_to_remove else 0

    def enlarge(self, slots: int) -> None:
        """Moves to storage of more slots."""
        old = self._states()
        filled = self.stored
        new = self._shared.buffers(self._index, *old, slots)
        for mine, theirs in zip(old, new, strict=True):
            theirs[:, :, :filled] = mine[:, :, :filled]
            theirs[:, :, filled:] = 0
        self._take(new)

    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.storage is not None
        return self.storage

    def _map_rows(self, change: Any) -> None:
        old = self._states()
        changed = change(old[0]), change(old[1])
        # The same number of rows finds the same storage again, and graphs that were recorded with it stay good.
        new = self._shared.buffers(self._index, *changed, self.slots)
        for mine, theirs in zip(changed, new, strict=True):
            theirs.copy_(mine)
        self._take(new)
        if self._kept is not None:
            self._kept = change(self._kept)
