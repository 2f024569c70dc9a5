"""Storage of a fixed size for compiled decoding, and never more tokens than fit."""

import copy
import logging
import weakref
from collections.abc import Sequence
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..model.decoder import Decoder
from .base import Pair, SelectedLayer, Selection, Storage
from .buffers import Buffers, Lengths
from .held import HeldLayer
from .states import StateLayer
from .windows import WindowGroup

# These are given a mask that hides what has not been written yet.  transformers gives flash attention none, and cannot
# compile flex attention with any cache.
_MASKED_ATTENTION = ("sdpa", "eager")
# Exactly these classes: others hold tokens by rules of their own.  The last one holds nothing; 5.17 does without it.
_FIXED = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, getattr(cache_utils, "DummyLayer", None))
_SLOTS_OF_SHORT_PROMPTS = 4096
_logger = logging.getLogger(__name__)


class StaticLayer(SelectedLayer):
    """A layer with a fixed number of slots: what a compiled decoding step sees.

    `keys` and `values` are all slots, (B, H_kv, slots, D); attention is masked where nothing has been written yet.
    `update` depends on no number that changes from prompt to prompt, so it is compiled once.

    Args:
        index: the layer's number.
        storage: that of all layers of the cache; it hears of each pass.
        slots: the layer's buffers, with the kept tokens in front and zeros behind them.
        kept: (B, H_kv, C) int64, the columns that were kept; None: all.
        stored: C.
        dropped: columns of the prompt that were not kept.
    """

    is_compileable = True

    def __init__(
        self, index: int, storage: "StaticStorage", slots: Pair, kept: torch.Tensor | None, *, stored: int, dropped: int
    ) -> None:
        super().__init__()
        self._index = index
        # Weak: without a cycle the buffers are free as soon as the cache is.
        self._weak_storage = weakref.ref(storage)
        self._lengths = storage.lengths
        self._is_first, self._is_last = storage.place_of(index)
        self._kept = kept
        self._dropped = dropped
        self.prompt_stored = stored
        self.is_initialized = True
        self._use(slots)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StaticLayer":
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._weak_storage = weakref.ref(copy.deepcopy(self._storage, memo))
        copied._lengths = copy.deepcopy(self._lengths, memo)
        copied._kept = copy.deepcopy(self._kept, memo)
        copied._use(copied._lengths.buffers.of_layer(self._index, *self.allocated, self.slots))
        return copied

    @property
    def _storage(self) -> "StaticStorage":
        storage = self._weak_storage()
        assert storage is not None
        return storage

    def _use(self, slots: Pair) -> None:
        self.keys, self.values = slots
        self.dtype, self.device = slots[0].dtype, slots[0].device

    @property
    def allocated(self) -> Pair:
        """All slots for keys and values, (B, H_kv, slots, D)."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @property
    def slots(self) -> int:
        """Tokens that there is room for."""
        return self.allocated[0].shape[2]

    @property
    def lengths(self) -> Lengths:
        """Those of all selected layers."""
        return self._lengths

    @property
    def filled(self) -> torch.Tensor:
        """Tokens held, 0-d int64: the slot that the next one is written to."""
        return self._lengths.filled

    @property
    def stored(self) -> int:
        """Tokens held; waits for the device."""
        return int(self._lengths.filled)

    @property
    def seen(self) -> int:
        """Tokens seen; waits for the device."""
        return int(self._lengths.seen)

    @property
    def dropped(self) -> int:
        """Tokens seen but not held."""
        return self._dropped

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Writes states (B, H_kv, t, D) behind the stored ones and returns all slots.

        Raises:
            ValueError: a batch of another size than the one stored.
        """
        self._match_rows(key_states)
        tokens = key_states.shape[-2]
        if self._is_first and not torch.compiler.is_compiling():
            self._storage.claim(tokens)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        places = self._lengths.filled + torch.arange(tokens, device=key_states.device)
        keys.index_copy_(2, places, key_states.detach())
        values.index_copy_(2, places, value_states.detach())
        if self._is_last:
            self._lengths.advance(tokens)
        return keys, values

    def get_seq_length(self) -> Any:
        """Tokens seen, the position of the next one: a 0-d tensor, as in transformers' `StaticLayer`."""
        return self._lengths.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention will see, and how many seen tokens lie before them."""
        return self.slots, self._dropped

    def enlarge(self, slots: int) -> None:
        """Moves to buffers of more slots."""
        old, filled = self.allocated, self.stored
        new = self._lengths.buffers.of_layer(self._index, *old, slots)
        for mine, theirs in zip(old, new, strict=True):
            theirs[:, :, :filled] = mine[:, :, :filled]
            theirs[:, :, filled:] = 0
        self._use(new)

    def _remove(self, count: int) -> None:
        if self._is_last:
            self._lengths.take_back(count)

    def _hold_rows(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._use(self._lengths.buffers.holding_layer(self._index, keys, values))


class StaticStorage(Storage):
    """Slots for the budget and for `max_new_tokens` in every selected layer, allocated once.

    Layers with a window, and states of linear attention, have their own sizes; they are in the same buffers.

    Args:
        decoder: of the model that decodes.
        budget: as the cache's.
        max_new_tokens: tokens that fit behind what is kept of the prompt; with more, all moves to larger storage.
    """

    is_compileable = True

    def __init__(self, decoder: Decoder, budget: int | float, max_new_tokens: int) -> None:
        self._decoder = decoder
        self._indices = sorted(decoder.attention)
        self._budget = budget
        self._new_tokens = max_new_tokens
        self._layers: list[StaticLayer] = []
        self._windows: dict[int, WindowGroup] = {}
        self._is_reserved = False

    @cached_property
    def buffers(self) -> Buffers:
        """Keys and values of all layers.  They stay when the cache is reset, and serve the model's next cache later."""
        return Buffers(self._decoder.blocks[0])

    @cached_property
    def lengths(self) -> Lengths:
        """Of the selected layers."""
        return Lengths(self.buffers, "selected")

    def check(self) -> None:
        """Raises ValueError if the model has been given an attention that reads slots which are not written yet."""
        attention = self._decoder.attention_implementation
        if attention not in _MASKED_ATTENTION:
            raise ValueError(
                f"attn_implementation={attention!r} was set after the cache was built with max_new_tokens, and would "
                "read slots that are not written yet; build a new cache"
            )

    def place_of(self, index: int) -> tuple[bool, bool]:
        """Whether a layer is the first of the selected ones, and whether it is the last."""
        return index == self._indices[0], index == self._indices[-1]

    def take_in(self, index: int, layer: Any) -> Any:
        """As in `Storage`: a layer in the buffers of this cache."""
        if type(layer) is DynamicSlidingWindowLayer:
            window = layer.sliding_window
            return self._windows.setdefault(window, WindowGroup(window, self._new_tokens)).add(index)
        if type(layer) is LinearAttentionLayer:
            return StateLayer(index, layer.number_of_states, self)
        return layer

    @torch.compiler.disable
    def store(self, index: int, layer: SelectedLayer, selection: Selection) -> StaticLayer:
        """As in `Storage`: a new layer in the buffers of this cache."""
        keys, values, stored = selection.keys, selection.values, selection.stored
        slots = self._new_tokens + (self._slots_of_prompt(stored) if selection.take is None else stored)
        out = self.buffers.of_layer(index, keys, values, slots)
        kept = None
        if selection.take is None:
            for part, states in zip(out, (keys, values), strict=True):
                part[:, :, :stored] = states
                part[:, :, stored:] = 0
        else:
            kept, _, _, refitted = selection.take(out)
            if refitted is not None:
                out[1][:, :, :stored] = refitted
        if index == self._indices[0]:
            self.lengths.start(stored, selection.seen, keys.device)
        held = StaticLayer(index, self, out, kept, stored=stored, dropped=selection.seen - stored)
        self._layers.append(held)
        return held

    def restore(self, index: int, held: HeldLayer) -> StaticLayer:
        """As in `Storage`: with the slots that the other layer had, if it had any."""
        states = held.keys, held.values
        out = self.buffers.of_layer(index, *states, held.slots or held.stored + self._new_tokens)
        for part, state in zip(out, states, strict=True):
            part[:, :, : held.stored] = state
            part[:, :, held.stored :] = 0
        if index == self._indices[0]:
            self.lengths.start(held.stored, held.seen, held.keys.device)
        layer = StaticLayer(index, self, out, held.kept, stored=held.stored, dropped=held.seen - held.stored)
        layer.prompt_stored = held.prompt_stored
        self._layers.append(layer)
        return layer

    def _slots_of_prompt(self, tokens: int) -> int:
        """Slots for a prompt that is kept whole: as many as for a longer one, so that one compilation serves both."""
        if not isinstance(self._budget, Integral):
            return tokens
        # A budget far above the prompts is not allocated at once.
        return min(int(self._budget), max(_SLOTS_OF_SHORT_PROMPTS, 1 << (tokens - 1).bit_length()))

    def release(self) -> None:
        """Ends the conversation; the buffers wait for the next one."""
        self._layers = []
        self._windows = {}
        self._is_reserved = False

    def reserve(self, tokens: int) -> None:
        """Makes sure that `tokens` more fit, before any layer writes one.

        A compiled step says nothing of itself to Python; the mask sizes, which are asked for before every step, do.
        They may be asked for more than once, so more slots than needed may be reserved; when they seem to run out, the
        device is asked how many are filled.
        """
        for group in self._windows.values():
            group.reserve(tokens, self.buffers)
        self._reserve_selected(tokens)

    def _reserve_selected(self, tokens: int) -> None:
        if not self.has_room_for(tokens):
            # Twice as much at least, so that a conversation of many turns is not compiled again in each.
            self._enlarge(max(self.lengths.taken + tokens + self._new_tokens, 2 * self._layers[0].slots))
        self.lengths.taken += tokens
        self._is_reserved = True

    def has_room_for(self, tokens: int) -> bool:
        """Whether so many tokens fit; asks the device only if they seem not to."""
        slots = self._layers[0].slots
        if self.lengths.taken + tokens > slots:
            self.lengths.taken = self._layers[0].stored
        return self.lengths.taken + tokens <= slots

    def claim(self, tokens: int) -> None:
        """The pass that slots were reserved for has begun; reserves them if no mask was asked for before it."""
        if not self._is_reserved:
            self._reserve_selected(tokens)
        self._is_reserved = False

    def _enlarge(self, slots: int) -> None:
        _logger.warning(
            "more tokens than max_new_tokens=%d: the cache moves to storage of %d slots, decoding is compiled again",
            self._new_tokens,
            slots,
        )
        for layer in self._layers:
            layer.enlarge(slots)


def obstacle_to_compiling(decoder: Decoder, layers: Sequence[Any]) -> str | None:
    """Why storage has to grow, and decoding to be eager; None where it can be static and decoding compiled.

    Args:
        decoder: of the model that decodes.
        layers: those of a `DynamicCache` for that model.
    """
    attention = decoder.attention_implementation
    if attention not in _MASKED_ATTENTION:
        return f"attn_implementation={attention!r} would read slots that are not written yet"
    others = [type(layer).__name__ for layer in layers if type(layer) not in _FIXED]
    if others:
        kinds = ", ".join(sorted(set(others)))
        return f"{len(others)} of {len(layers)} layers ({kinds}) have no storage of a fixed size"
    if decoder.has_chunks:
        return "transformers compiles no decoding with chunked attention"
    if not decoder.is_on_one_device:
        return "the weights are offloaded, or on several devices"
    return None
