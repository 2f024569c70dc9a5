"""The caches: a DynamicCache that selects from each layer's prompt while it is being prefilled."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from shiftkv_kernels import gather, keep_best

from .checks import BACKENDS, check_budget, check_choice, check_prefill, tokens_to_keep
from .methods.base import Method
from .model.decoder import Decoder, text_decoder
from .model.hooks import LayerInput, PrefillHooks
from .model.padding import PromptPadding
from .report import CacheReport, report_of
from .storage.growing import GrowingLayer
from .storage.room import Room, obstacle_to_compiling
from .storage.static import StaticLayer

# While assisted decoding records, the first forward pass holds the prompt and its first candidates; of them, this many
# last tokens stay as they are seen until the accepted ones are known.
_MOST_CANDIDATES = 256


class PrefillSelectionCache(DynamicCache):
    """A cache that keeps, of each full-attention layer's prompt, the tokens that a method scores highest.

    The prompt itself is attended to in full; only what is stored is less.  Later tokens, those of later chat turns
    included, are all stored.  Positions go on as if nothing had been dropped.  Layers of other kinds (sliding window,
    linear attention, shared) are what `DynamicCache(config=...)` makes them.

    One cache serves one conversation at a time: call `reset()` before another prompt.  Gradients do not flow through
    what is stored.

    Args:
        model: the model that the cache will be used with.
        method: gives the scores.
        budget: tokens kept per KV head and layer (int), or the share of the prompt's columns (float), rounded up.
        max_new_tokens: room for so many tokens behind what is kept of the prompt, in storage that stays where it is, so
            that `generate` compiles decoding; None: storage grows, and decoding is eager.
        prefill: "single", or "chunked" when several forward passes hold the prompt.
        prompt_length: columns of the whole prompt, for "chunked"; None: the first one-token pass ends the prompt.
        backend: "auto" (Triton kernels on a GPU, plain torch elsewhere), "triton" or "torch".

    Raises:
        TypeError, ValueError: `model` is not supported (the message names what is missing), or a bad budget or prefill.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        budget: int | float,
        *,
        max_new_tokens: int | None = None,
        prefill: str = "single",
        prompt_length: int | None = None,
        backend: str = "auto",
    ) -> None:
        check_budget(budget)
        check_prefill(max_new_tokens, prefill, prompt_length)
        check_choice("backend", backend, BACKENDS)
        text_decoder(model)
        super().__init__(config=model.config)
        # Exactly this class: its subclasses drop or share tokens by rules of their own.
        selected = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not selected:
            raise ValueError(f"model: {type(model).__name__} is not supported: it has no full-attention layer")
        self._decoder = Decoder(model, selected)
        for index in selected:
            self.layers[index] = GrowingLayer()
        self._selected = selected
        self._room: Room | None = None
        if max_new_tokens is not None:
            obstacle = obstacle_to_compiling(self._decoder, len(self.layers), prefill)
            if obstacle is None:
                self._room = Room(self._decoder, budget, max_new_tokens, backend)
            else:
                warnings.warn(
                    f"max_new_tokens={max_new_tokens} reserves nothing, and decoding is not compiled: {obstacle}",
                    stacklevel=3,
                )
        self._method = method
        self._budget = budget
        self._prefill = prefill
        self._prompt_length = prompt_length
        self._backend = backend
        self._hooks = PrefillHooks(self._decoder)
        self._padding: PromptPadding | None = None

    def kept_indices(self, layer: int) -> torch.Tensor | None:
        """The columns of the first prompt's input that `layer` holds.

        Returns:
            (batch, kv_heads, kept) int64, ascending, padding counted; it follows beams and row selection.  None before
            the prefill has ended, and for layers that are not compressed.

        Raises:
            ValueError: there is no such layer.
        """
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(self.layers):
            raise ValueError(f"layer={layer!r} must be an int from 0 to {len(self.layers) - 1}")
        held = self.layers[layer]
        return held.kept_indices if isinstance(held, GrowingLayer) else None

    def report(self) -> CacheReport:
        """Tokens seen and stored, bytes stored and saved, by layer and in all; prints as a table."""
        return report_of(self.layers)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile decoding: `max_new_tokens` was given, and nothing was in the way."""
        first = self.layers[self._selected[0]]
        return isinstance(first, StaticLayer) or (self._room is not None and not first.record_past)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in transformers.  It is also the first that a cache hears of a forward pass, so a prefill starts here.

        Raises:
            ValueError: an empty prompt, a cache whose last prefill was interrupted, or one without room for another
                token.
        """
        self._begin_forward(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores what is kept of new keys and values, (B, H_kv, t, D), and returns what this pass attends to.

        Raises:
            ValueError: the prompt is padded elsewhere than on the left, longer than `prompt_length`, or was not seen:
                the cache belongs to another model, or the model was given a ready-made 4-D mask.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, GrowingLayer) or not layer.in_prompt:
            if self._room is not None and not torch.compiler.is_compiling():
                self._room.arrive(layer_idx, key_states.shape[-2])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        inputs = self._hooks.take(layer_idx)
        if inputs is None:
            self._hooks.detach()
            raise ValueError(
                f"model: layer {layer_idx} was not seen while it got its prompt.  Either the cache was built for "
                "another model than the one that is run (build it for this one), or the model was given a 4-D "
                "attention_mask (give it the 2-D one)"
            )
        with torch.no_grad():
            return self._store_prompt(layer_idx, layer, inputs, key_states.detach(), value_states.detach())

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is their number, negative.

        Raises:
            ValueError: it is positive, or reaches into a compressed prompt; nothing is changed then.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding may pass a tensor
        for index in self._selected:
            self.layers[index].check_crop(tokens_to_remove)
        pending = self.layers[self._selected[0]].pending
        if pending:
            self._take_back(-tokens_to_remove)
        first = self.layers[self._selected[0]]
        if isinstance(first, StaticLayer) and tokens_to_remove and first.stored == -tokens_to_remove:
            self.reset()
            return
        super().crop(tokens_to_remove)
        self._end_pending_prompt()

    def reset(self) -> None:
        """Empties the cache for another prompt."""
        self._hooks.detach()
        self._padding = None
        if self._room is not None:
            self._room.move_out()
        for index, fresh in enumerate(self._decoder.fresh_layers()):
            # transformers before 5.18 fills sliding layers with zeros, which the next prompt would attend to.
            self.layers[index] = GrowingLayer() if index in self._selected else fresh

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the batch rows `beam_idx`, in that order."""
        self._end_pending_prompt()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times."""
        self._end_pending_prompt()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Takes the batch rows `indices`: numbers or a boolean mask."""
        self._end_pending_prompt()
        super().batch_select_indices(indices)

    def _begin_forward(self, query_length: int) -> None:
        first = self.layers[self._selected[0]]
        if self._room is not None:
            self._room.check()
        if not first.in_prompt:
            if any(self.layers[index].in_prompt for index in self._selected):
                raise ValueError("the cache holds part of a prompt whose prefill was interrupted; call reset()")
            if self._room is not None and not torch.compiler.is_compiling():
                self._room.announce(query_length)
            if not isinstance(first, StaticLayer) and first.dropped and first.cumulative_length == query_length > 1:
                # Chunks cannot be told from turns for certain, but turns are rarely as long as the prompt to the token.
                warnings.warn(
                    f"a second pass of {query_length} tokens right after a prompt of as many: if they are chunks of "
                    'one prompt, build the cache with prefill="chunked", or only the first is compressed',
                    stacklevel=2,
                )
            return
        # A prompt whose length was announced ends by itself, in `_collect`.
        may_go_on = self._prompt_length is not None or query_length > 1
        if first.pending and not (self._prefill == "chunked" and may_go_on):
            self._end_pending_prompt()
            return
        if query_length == 0:
            raise ValueError("input_ids: the prompt is empty; at least one token is needed")
        self._check_chunk(first.cumulative_length + query_length)
        self._padding = None
        self._hooks.attach(self)

    def _check_chunk(self, tokens: int) -> None:
        if self._prompt_length is not None and tokens > self._prompt_length:
            raise ValueError(f"prompt_length={self._prompt_length}, but the prompt has at least {tokens} columns")
        chunk = self._decoder.prefill_chunk_size
        if self._prefill == "single" and chunk is not None:
            raise ValueError(
                f'prefill="single", but the model\'s generation_config sets prefill_chunk_size={chunk}: '
                'build the cache with prefill="chunked"'
            )

    def _store_prompt(
        self, index: int, layer: GrowingLayer, inputs: LayerInput, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = layer.cumulative_length + keys.shape[-2]
        if self._padding is None:
            self._padding = PromptPadding(inputs.mask, keys.shape[0], seen, keys.device)
        if self._prefill == "chunked" or layer.record_past:
            valid = self._padding.unchecked(keys.device)
            recent = None if valid is None else valid[:, -keys.shape[-2] :]
            return self._collect(index, layer, replace(inputs, valid=recent), keys, values)
        inputs = replace(inputs, valid=self._padding.valid(keys.device))
        if tokens_to_keep(self._budget, seen) < seen:
            self._select(index, layer, self._observe(index, inputs, None), keys, values)
        elif self._room is not None:
            self.layers[index] = self._room.move_in(index, None, keys, values)
        else:
            keys, values = layer.update(keys, values)
            layer.keep_all()
        return keys, values

    def _collect(
        self, index: int, layer: GrowingLayer, inputs: LayerInput, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a piece of a prompt that may have more to come, or whose last tokens may be taken back."""
        if layer.tail is not None:
            layer.summary = self._observe(index, layer.tail, layer.summary)
        tokens = keys.shape[-2]
        sure = max(tokens - _MOST_CANDIDATES, 0) if layer.record_past else tokens
        if sure:
            layer.summary = self._observe(index, inputs.tokens(0, sure), layer.summary)
        layer.tail = inputs.tokens(sure, tokens).copied() if sure < tokens else None
        stored = layer.collect(keys, values)
        if layer.cumulative_length == self._prompt_length and not layer.record_past:
            self._end_prompt(index, layer)
        return stored

    def _observe(self, index: int, inputs: LayerInput, earlier: Any) -> Any:
        return self._method.observe(self._decoder.attention[index], inputs, earlier)

    def _take_back(self, tokens: int) -> None:
        """Forgets the last tokens of a prompt that is being collected."""
        layers = [self.layers[index] for index in self._selected]
        known = 0 if layers[0].tail is None else layers[0].tail.hidden_states.shape[1]
        if tokens and tokens >= known:
            raise ValueError(
                f"tokens_to_remove={-tokens}: the prompt is not selected from yet, and only {max(known - 1, 0)} of its "
                "last tokens can be removed"
            )
        for layer in layers:
            if layer.tail is not None:
                layer.tail = layer.tail.tokens(0, known - tokens)
        if self._padding is not None:
            self._padding.take_back(tokens)

    def _end_pending_prompt(self) -> None:
        """Selects from a prompt that is complete but was still being collected."""
        for index in self._selected:
            if self.layers[index].pending:
                self._end_prompt(index, self.layers[index])

    @torch.no_grad()
    def _end_prompt(self, index: int, layer: GrowingLayer) -> None:
        assert self._padding is not None
        self._padding.valid(layer.device)
        if tokens_to_keep(self._budget, layer.cumulative_length) == layer.cumulative_length:
            layer.keep_all()
            return
        summary = layer.summary if layer.tail is None else self._observe(index, layer.tail, layer.summary)
        self._select(index, layer, summary, *layer.states)

    def _select(self, index: int, layer: GrowingLayer, summary: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert self._padding is not None
        seen = keys.shape[-2]
        count = tokens_to_keep(self._budget, seen)
        valid = self._padding.valid(keys.device)
        scores = self._method.score(self._decoder.attention[index], summary, keys, values, valid)
        kept = keep_best(scores, count, valid, backend=self._backend)
        if self._room is not None and not layer.record_past:
            self.layers[index] = self._room.move_in(index, kept, keys, values)
        else:
            layer.keep_selection(kept, *gather(keys, values, kept, backend=self._backend), seen)
