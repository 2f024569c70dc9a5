"""Layers that attend to a window of the last tokens, in storage of a fixed size.

A prompt and later turns come in as in transformers' dynamic layer.  Single tokens are then written one behind another
into slots, as in the selected layers, and the mask hides what has left the window.  When the slots are full, between
two steps, the window moves to their front.  transformers' static layer moves it in every step instead, and looks at a
number in Python that changes from step to step.
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .base import Pair, check_rows
from .buffers import Buffers, Lengths

# Room behind the window: a move costs about as much as a step, so one in so many steps is no matter; and no more room
# than a part of the window, since attention reads all slots.
_LEAST_ROOM = 64
_ROOM = 1 / 4
_ALIGNMENT = 8  # slots: attention kernels copy masks of other lengths


class WindowLayer(DynamicSlidingWindowLayer):
    """A layer with a window: "open" as `DynamicSlidingWindowLayer` is, or "fixed" as a compiled decoding step sees it.

    Fixed, `keys` and `values` are all slots, (B, H_kv, slots, D), and `update` depends on no number in Python.

    Args:
        index: the layer's number.
        sliding_window: tokens that one token attends to, itself included.
        group: all layers with that window; it fixes and opens them.
    """

    is_compileable = True

    def __init__(self, index: int, sliding_window: int, group: "WindowGroup") -> None:
        super().__init__(sliding_window)
        self.index = index
        # Weak: without a cycle the buffers are free as soon as the cache is.
        self._weak_group = weakref.ref(group)
        self._lengths: Lengths | None = None
        self._is_first = self._is_last = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "WindowLayer":
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._weak_group = weakref.ref(copy.deepcopy(self._group, memo))
        copied._lengths = copy.deepcopy(self._lengths, memo)
        if copied._lengths is None:
            copied.keys, copied.values = copy.deepcopy((self.keys, self.values), memo)
        else:
            copied.keys, copied.values = copied._lengths.buffers.of_layer(self.index, *self.allocated, self.slots)
        return copied

    @property
    def _group(self) -> "WindowGroup":
        group = self._weak_group()
        assert group is not None
        return group

    @property
    def allocated(self) -> Pair:
        """All slots for keys and values, (B, H_kv, slots, D); those held while it is open."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @property
    def slots(self) -> int:
        """Tokens that there is room for."""
        return self.allocated[0].shape[2]

    @property
    def lengths(self) -> Lengths | None:
        """Those of all layers with that window; None while the layer is open."""
        return self._lengths

    @property
    def filled(self) -> torch.Tensor:
        """Tokens held, 0-d int64: the slot that the next one is written to.  Of a fixed layer."""
        assert self._lengths is not None
        return self._lengths.filled

    @property
    def stored(self) -> int:
        """Tokens held; waits for the device."""
        if self._lengths is not None:
            return int(self._lengths.filled)
        return self.slots if self.is_initialized else 0

    @property
    def seen(self) -> int:
        """Tokens seen; waits for the device."""
        return self.cumulative_length if self._lengths is None else int(self._lengths.seen)

    @property
    def needed(self) -> int:
        """Tokens that later ones attend to, and that a `DynamicSlidingWindowLayer` holds."""
        return min(self.seen, self.sliding_window - 1)

    @property
    def dropped(self) -> int:
        """Tokens seen before those that a fixed layer holds."""
        return self._group.dropped

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(part.nbytes for part in self.allocated) if self.is_initialized else 0

    def fix(self, lengths: Lengths, slots: Pair) -> None:
        """Goes on in `slots`, which hold what the layer held."""
        self._lengths = lengths
        self.keys, self.values = slots
        self._is_first, self._is_last = self._group.place_of(self)

    def open(self, start: int, stop: int, seen: int) -> None:
        """Goes on as a dynamic layer that holds what the slots start to stop hold."""
        keys, values = self.allocated
        self.keys, self.values = keys[:, :, start:stop].clone(), values[:, :, start:stop].clone()
        self.cumulative_length, self._lengths = seen, None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Stores states (B, H_kv, t, D), and returns all that they attend to: fixed, all slots.

        Raises:
            ValueError: a batch of another size than the one stored.
        """
        if self._lengths is not None and key_states.shape[2] != 1:
            self._group.open()
        if self._lengths is None:
            return self._append(key_states, value_states)
        if self._is_first and not torch.compiler.is_compiling():
            self._group.claim()
        self._match_rows(key_states)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        place = self._lengths.filled.view(1)
        keys.index_copy_(2, place, key_states.detach())
        values.index_copy_(2, place, value_states.detach())
        if self._is_last:
            self._lengths.advance(1)
        return keys, values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As in transformers, but for its copy of a number to the device, which would wait for the device."""
        self._sliding_window_tensor = torch.full((), self.sliding_window, device=key_states.device)
        super().lazy_initialization(key_states, value_states)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        if self.is_initialized:
            self._match_rows(key_states)
        attended = super().update(key_states, value_states)
        if not self.record_past:
            # As a view the window would keep the whole prompt.
            keys, values = self.allocated
            self.keys, self.values = keys.detach().clone(), values.detach().clone()
        return attended

    def get_seq_length(self) -> Any:
        """Tokens seen, the position of the next one: of a fixed layer a 0-d tensor."""
        return self.cumulative_length if self._lengths is None else self._lengths.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention will see, and how many seen tokens lie before them."""
        if self._lengths is not None and query_length != 1:
            self._group.open()
        return super().get_mask_sizes(query_length) if self._lengths is None else (self.slots, self.dropped)

    def activate_past_recording(self) -> None:
        """As in transformers; the layer is open from then on."""
        self._group.open()
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is their number, negative.

        Raises:
            ValueError: as `check_window`.
        """
        check_window(self, tokens_to_remove)
        if self._lengths is None:
            super().crop(tokens_to_remove)
        elif self._is_last:
            self._lengths.take_back(-tokens_to_remove)

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
        if not self.is_initialized:
            return
        keys, values = map(change, self.allocated)
        if self._lengths is not None:
            keys, values = self._lengths.buffers.holding_layer(self.index, keys, values)
        self.keys, self.values = keys, values

    def _match_rows(self, key_states: torch.Tensor) -> None:
        """Repeats a single row for a batch, as the selected layers do."""
        rows, held = key_states.shape[0], self.allocated[0].shape[0]
        if rows != held:
            check_rows(rows, held)
            self.batch_repeat_interleave(rows)


def check_window(layer: DynamicSlidingWindowLayer, tokens_to_remove: int) -> None:
    """Raises ValueError if tokens that have left a layer would be in its window without the last ones.

    Args:
        layer: of transformers or of this package.
        tokens_to_remove: how many are to be removed, negative.
    """
    if layer.record_past or not layer.is_initialized:
        return
    if isinstance(layer, WindowLayer):
        stored, seen = layer.stored, layer.seen
    else:
        stored, seen = layer.keys.shape[2], layer.cumulative_length
    if stored + tokens_to_remove < min(seen + tokens_to_remove, layer.sliding_window - 1):
        raise ValueError(
            f"tokens_to_remove={tokens_to_remove}: a layer has a window of {layer.sliding_window} tokens, and those "
            "that would be in it again are gone"
        )


class WindowGroup:
    """All layers of a cache with the same window: they hold the same number of tokens, and move together.

    Args:
        window: tokens that one token attends to, itself included.
        new_tokens: how many single tokens are expected behind a prompt.

    Attributes:
        layers: the layers, in order.
        dropped: tokens seen before those in the slots.
    """

    def __init__(self, window: int, new_tokens: int) -> None:
        room = min(new_tokens, max(_LEAST_ROOM, int(window * _ROOM)))
        # A step needs the window before its token and a slot for that.
        self._slots = -(-(window - 1 + max(room, 1)) // _ALIGNMENT) * _ALIGNMENT
        self._window = window
        self.layers: list[WindowLayer] = []
        self.dropped = 0
        self._lengths: Lengths | None = None
        self._is_reserved = False

    def add(self, index: int) -> WindowLayer:
        """An empty layer; layers come in order."""
        layer = WindowLayer(index, self._window, self)
        self.layers.append(layer)
        return layer

    def place_of(self, layer: WindowLayer) -> tuple[bool, bool]:
        """Whether a layer is the first of the group, and whether it is the last."""
        return layer is self.layers[0], layer is self.layers[-1]

    def reserve(self, tokens: int, buffers: Buffers) -> None:
        """Makes ready for a forward pass of so many tokens behind a prompt.  It may be called again before that pass.

        For one token all layers are fixed, in `buffers`; for several they are open.
        """
        if tokens != 1 or any(layer.record_past or not layer.is_initialized for layer in self.layers):
            self.open()
            return
        if self._lengths is None:
            self._fix(buffers)
        self._make_room()
        self._is_reserved = True

    def claim(self) -> None:
        """A pass of one token has begun; makes room for it if it was not announced."""
        if not self._is_reserved:
            self._make_room()
        self._is_reserved = False

    def open(self) -> None:
        """Turns fixed layers into open ones."""
        if self._lengths is None:
            return
        filled, seen = int(self._lengths.filled), int(self._lengths.seen)
        self._lengths = None
        for layer in self.layers:
            layer.open(filled - min(filled, self._window - 1), filled, seen)

    def _fix(self, buffers: Buffers) -> None:
        first = self.layers[0]
        held, seen = first.needed, first.seen
        self._lengths = Lengths(buffers, ("window", self._window))
        self._lengths.start(held, seen, first.allocated[0].device)
        self.dropped = seen - held
        for layer in self.layers:
            last = tuple(part[:, :, part.shape[2] - held :] for part in layer.allocated)
            slots = buffers.of_layer(layer.index, last[0], last[1], self._slots)
            for part, states in zip(slots, last, strict=True):
                part[:, :, :held] = states
                # Slots not yet written are multiplied by zero, so they must hold numbers.
                part[:, :, held:] = 0
            layer.fix(self._lengths, slots)

    def _make_room(self) -> None:
        lengths = self._lengths
        assert lengths is not None
        if lengths.taken + 1 > self._slots:
            lengths.taken = int(lengths.filled)
        if lengths.taken + 1 > self._slots:
            self._move_to_front(lengths)
        lengths.taken += 1

    def _move_to_front(self, lengths: Lengths) -> None:
        held = self._window - 1
        start, stop = lengths.taken - held, lengths.taken
        for layer in self.layers:
            for part in layer.allocated:
                part[:, :, :held] = part[:, :, start:stop].clone()
        lengths.filled.fill_(held)
        lengths.taken = held
        self.dropped += start
