"""Storage with room for a known number of new tokens, so that decoding can be compiled, and never more than fit."""

import logging
from numbers import Integral

import torch

from shiftkv_kernels import gather

from ..model.decoder import Decoder
from .buffers import Buffers
from .static import StaticLayer

# These are given a mask that hides what has not been written yet.  transformers gives flash attention none, and cannot
# compile flex attention with any cache.
_MASKED_ATTENTION = ("sdpa", "eager")
_logger = logging.getLogger(__name__)


class Room:
    """The fixed storage of one cache: room for its budget and for `max_new_tokens` in every selected layer.

    Args:
        decoder: of the model that decodes.
        budget: as the cache's.
        max_new_tokens: tokens that fit behind what is kept of the prompt.  Later turns and their answers may be longer:
            then everything moves to larger storage.
        backend: "auto", "triton" or "torch".
    """

    def __init__(self, decoder: Decoder, budget: int | float, max_new_tokens: int, backend: str) -> None:
        self._decoder = decoder
        self._indices = sorted(decoder.attention)
        self._budget = budget
        self._new_tokens = max_new_tokens
        self._backend = backend
        self._storage: Buffers | None = None
        self._layers: list[StaticLayer] = []
        self._has_turns = False
        self._is_announced = False

    def check(self) -> None:
        """Raises ValueError if the model has been given an attention that cannot read fixed storage."""
        attention = self._decoder.attention_implementation
        if attention not in _MASKED_ATTENTION:
            raise ValueError(
                f"attn_implementation={attention!r} was set after the cache was built with max_new_tokens, and would "
                "read slots that are not written yet; build a new cache"
            )

    def move_in(self, index: int, kept: torch.Tensor | None, keys: torch.Tensor, values: torch.Tensor) -> StaticLayer:
        """The layer that takes the prompt over from layer `index`.

        Args:
            index: the layer's number; layers come in order.
            kept: (B, H_kv, C) int64, the columns to keep; None: all.
            keys, values: (B, H_kv, T, D), of the whole prompt.
        """
        seen = keys.shape[-2]
        stored = seen if kept is None else kept.shape[-1]
        if self._storage is None:
            self._storage = Buffers(self._decoder.blocks[0])
        # Room for the whole budget whatever the prompt's length: one size, one compilation.
        slots = self._new_tokens + (int(self._budget) if isinstance(self._budget, Integral) else stored)
        out = self._storage.buffers(index, keys, values, slots)
        if kept is None:
            for part, states in zip(out, (keys, values), strict=True):
                part[:, :, :seen] = states
                part[:, :, seen:] = 0
        else:
            gather(keys, values, kept, out=out, backend=self._backend)
        if index == self._indices[0]:
            self._storage.start(stored, seen, keys.device)
        is_last = index == self._indices[-1]
        layer = StaticLayer(index, self._storage, out, kept, stored=stored, seen=seen, is_last=is_last)
        self._layers.append(layer)
        return layer

    def move_out(self) -> None:
        """Ends the conversation; its storage waits for the next one."""
        self._layers = []
        self._has_turns = self._is_announced = False

    def announce(self, tokens: int) -> None:
        """Makes sure that `tokens` more fit behind the prompt, if that has ended, before any layer writes one.

        A compiled step says nothing of itself to Python; the mask sizes, which are asked for before every step, do.
        They may be asked for more than once, so `counted` may be too large, and the device is asked when it seems full.

        Raises:
            ValueError: there is no room for another token of the first answer; nothing has been changed then.
        """
        if not self._layers:
            return
        assert self._storage is not None
        slots = self._layers[0].slots
        # Several tokens are a later turn.
        has_turns = self._has_turns or tokens > 1
        if self._storage.counted + tokens > slots:
            self._storage.counted = self._layers[0].stored
        if self._storage.counted + tokens > slots:
            if not has_turns:
                raise ValueError(
                    f"max_new_tokens={self._new_tokens}: all {slots} slots of the cache are filled; build it with a "
                    "larger number, or without one for storage that grows"
                )
            # Twice as much at least, so that a conversation of many turns is not compiled again in each.
            self._enlarge(max(self._storage.counted + tokens + self._new_tokens, 2 * slots))
        self._storage.counted += tokens
        self._has_turns = has_turns
        self._is_announced = True

    def arrive(self, index: int, tokens: int) -> None:
        """As `announce`, when tokens come to layer `index`; it has no effect if they were announced."""
        if index != self._indices[0]:
            return
        if not self._is_announced:
            self.announce(tokens)
        self._is_announced = False

    def _enlarge(self, slots: int) -> None:
        _logger.warning(
            "the cache moves to storage of %d slots for a later turn: decoding is compiled again for it", slots
        )
        for layer in self._layers:
            layer.enlarge(slots)


def obstacle_to_compiling(decoder: Decoder, layers: int, prefill: str) -> str | None:
    """Why storage has to grow, and decoding to be eager; None where it can be fixed and decoding compiled.

    Args:
        decoder: of the model that decodes.
        layers: how many layers the cache has.
        prefill: "single" or "chunked".
    """
    attention = decoder.attention_implementation
    if attention not in _MASKED_ATTENTION:
        return f"attn_implementation={attention!r} would read slots that are not written yet"
    if prefill == "chunked":
        return 'with prefill="chunked", generate would compile the chunks too'
    if len(decoder.attention) < layers:
        return f"{layers - len(decoder.attention)} of {layers} layers are not full-attention layers"
    if not decoder.is_on_one_device:
        return "the weights are offloaded, or on several devices"
    return None
