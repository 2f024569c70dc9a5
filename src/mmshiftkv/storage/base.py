"""What all storage has in common: a layer that holds fewer tokens than it has seen, and the contract of a storage.

Shapes of keys and values say D for the head dim of each: that of the values may be another than that of the keys.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from .held import HeldLayer

Pair = tuple[torch.Tensor, torch.Tensor]


class Taken(NamedTuple):
    """What was kept of one layer's prompt.

    Attributes:
        columns: (B, H_kv, C) int64, those that were kept, ascending.
        keys, values: (B, H_kv, S, D) and (B, H_kv, S, D_v), of these columns and, from C on, zeros.
        refitted: (B, H_kv, C, D_v), what to hold in place of these values; None: these.
    """

    columns: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    refitted: torch.Tensor | None


@dataclass(frozen=True)
class Selection:
    """What is to be kept of one layer's prompt.

    Attributes:
        keys, values: (B, H_kv, T, D) and (B, H_kv, T, D_v), of the whole prompt.
        stored: C, the columns that are kept.
        take: chooses them, and copies them to the first of S slots that it is given, or to memory of their own; None:
            all are kept.
    """

    keys: torch.Tensor
    values: torch.Tensor
    stored: int
    take: Callable[[Pair | None], Taken] | None

    @property
    def seen(self) -> int:
        """T, the columns of the prompt."""
        return self.keys.shape[2]


class SelectedLayer(DynamicLayer, ABC):
    """A layer from whose prompt tokens are selected.

    It fills the first `stored` of its `allocated` slots: with what was kept of the prompt, and behind it with all that
    came later.
    Positions follow `seen`.

    Attributes:
        prompt_stored: how many of the stored tokens belong to the prompt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt_stored = 0
        self._kept: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is held on the device."""
        return *(self.allocated or ()), *(() if self._kept is None else (self._kept,))

    @property
    @abstractmethod
    def allocated(self) -> Pair | None:
        """All slots for keys and values, (B, H_kv, slots, D); None before the first token."""

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens seen."""

    @property
    @abstractmethod
    def stored(self) -> int:
        """Tokens held, at most those seen."""

    @abstractmethod
    def _remove(self, count: int) -> None:
        """Forgets the last tokens."""

    @abstractmethod
    def _hold_rows(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes other rows of the whole storage in its place."""

    @property
    def dropped(self) -> int:
        """Tokens seen but not held."""
        return self.seen - self.stored

    @property
    def prompt_columns(self) -> int:
        """Columns of the prompt, dropped ones included."""
        return self.prompt_stored + self.dropped

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, in all rows and KV heads."""
        return sum(part[:, :, :1].nbytes for part in self.allocated) if self.allocated else 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the storage, slots not yet filled included."""
        return sum(part.nbytes for part in self.allocated) if self.allocated else 0

    @property
    def kept_indices(self) -> torch.Tensor | None:
        """(B, H_kv, kept) int64: the prompt's columns that are held, ascending; None before the prompt has ended."""
        if self._kept is not None or not self.prompt_stored:
            return self._kept
        assert self.allocated is not None
        everything = torch.arange(self.prompt_stored, device=self.device)
        return everything.expand(*self.allocated[0].shape[:2], -1).clone()

    def keep_all(self) -> None:
        """Ends the prompt with everything that is held of it."""
        self.prompt_stored = self.stored

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is their number, negative, as in transformers.

        Raises:
            ValueError: it is positive, or reaches into a prompt from which tokens have been dropped.
        """
        count = self.check_crop(tokens_to_remove)
        if count:
            left = self.stored - count
            self._remove(count)
            self.prompt_stored = min(self.prompt_stored, left)

    def check_crop(self, tokens_to_remove: int) -> int:
        """The number of tokens that `crop` would remove; raises as `crop` does and changes nothing."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} must be negative (the number of tokens) or 0")
        if tokens_to_remove == 0:
            return 0
        fixed = self.prompt_stored if self.dropped else 0
        removable = self.stored - fixed
        if -tokens_to_remove > removable:
            reason = "the prompt before them is compressed" if fixed else "no more are stored"
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: only {removable} tokens can be removed, {reason}")
        return -tokens_to_remove

    def reset(self) -> None:
        """Not for a layer by itself: RuntimeError.  The cache puts a new layer in its place."""
        raise RuntimeError("call reset() of the cache, not of one of its layers")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the batch rows `beam_idx`, in that order."""
        self._change_rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times."""
        self._change_rows(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Takes the batch rows `indices`: numbers or a boolean mask."""
        self._change_rows(lambda part: part[torch.as_tensor(indices, device=part.device)])

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.allocated is None:
            return
        self._hold_rows(*map(change, self.allocated))
        if self._kept is not None:
            self._kept = change(self._kept)

    def _match_rows(self, key_states: torch.Tensor) -> None:
        """Repeats a single row for a batch, such as the beams of a prompt.

        Raises:
            ValueError: another number of rows than the one stored.
        """
        assert self.keys is not None
        rows, held = key_states.shape[0], self.keys.shape[0]
        if rows == held:
            return
        check_rows(rows, held)
        self.batch_repeat_interleave(rows)


def check_rows(rows: int, held: int) -> None:
    """Raises ValueError if a batch of so many rows cannot be meant for what `held` rows hold."""
    if held not in (1, rows):
        raise ValueError(f"keys of batch size {rows}, the cache holds {held} rows; call reset() before another prompt")


class Storage(ABC):
    """Where the layers of one cache hold their tokens; the selected ones once their prompt has ended.

    Attributes:
        is_compileable: whether decoding on it may be compiled.
    """

    is_compileable: bool

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError if the model has changed so that it could not read this storage."""

    @abstractmethod
    def take_in(self, index: int, layer: Any) -> Any:
        """The layer to use in place of an empty one of `DynamicCache` that is not selected; layers come in order."""

    @abstractmethod
    def store(self, index: int, layer: SelectedLayer, selection: Selection) -> SelectedLayer:
        """Takes a layer's prompt over.

        Args:
            index: the layer's number; layers come in order.
            layer: what the prompt was collected in; it holds the whole prompt if all of it is kept.
            selection: what is kept.

        Returns:
            The layer that takes the place of `layer`.
        """

    @abstractmethod
    def restore(self, index: int, held: "HeldLayer") -> SelectedLayer:
        """A new layer with a copy of what another one held; layers come in order."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Makes sure, before a forward pass of so many tokens, that they fit behind what is held."""

    @abstractmethod
    def has_room_for(self, tokens: int) -> bool:
        """Whether so many tokens fit without a move to larger storage."""

    @abstractmethod
    def release(self) -> None:
        """Ends the conversation: its layers are not used any more."""
