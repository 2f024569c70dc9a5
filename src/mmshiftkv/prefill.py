"""One prompt, from its first token to its selection.

A cache is in one of two phases.  While it holds a `Prefill`, tokens belong to the prompt; afterwards every token is
stored.  A prompt ends

- where `generate` knows that it ends: with its last chunk, or before the candidates of assisted decoding;
- else with its only pass (`prefill="single"`), or with the pass that completes `prompt_length` ("chunked");
- else with `end_prompt()` of the cache, or before its rows change ("chunked" without a length).

A pass that did not reach all layers leaves the prompt interrupted: only `reset()` ends that.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from shiftkv_kernels import gather, keep_best
from shiftkv_kernels.device import compile_once

from .checks import tokens_to_keep
from .finite import FiniteCheck
from .methods.base import Method, checked_scores, checked_values, what_is_read
from .model.decoder import Decoder
from .model.generation import GenerateCall
from .model.hooks import LayerInput, PrefillHooks
from .model.padding import PromptPadding
from .side_stream import SideStream, takes_side_stream
from .storage.base import Pair, SelectedLayer, Selection, Storage, Taken

# Keys and values (B, H_kv, T, D), a mask (B, T) where there is padding, and a flag for what is not finite.
_Prompt = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


@dataclass(frozen=True)
class PromptSettings:
    """How prompts come, and what is kept of them.

    Attributes:
        budget: tokens kept per KV head and layer (int), or the share of the prompt's columns (float), rounded up.
        prefill: "single" if a prompt comes in one forward pass, "chunked" if in several.
        prompt_length: columns of the whole prompt, for "chunked"; None: it is told by `end_prompt()`.
        backend: "auto", "triton" or "torch".
    """

    budget: int | float
    prefill: str
    prompt_length: int | None
    backend: str


class Prefill:
    """A prompt that is being prefilled, from its first forward pass until all layers have been selected from.

    Each pass is announced (`begin_pass`) and then comes layer by layer (`update`).

    Args:
        settings: how the prompt comes.
        decoder: the model's decoder.
        hooks: show what the layers see.
        method: scores the prompt's tokens.
        storage: takes over what is kept.

    Attributes:
        finite: whether the scores so far were.
    """

    def __init__(
        self, settings: PromptSettings, decoder: Decoder, hooks: PrefillHooks, method: Method, storage: Storage
    ) -> None:
        self._settings = settings
        self._decoder = decoder
        self._hooks = hooks
        self._method = method
        self._storage = storage
        self._has_candidates = False
        self._end: int | None = None
        self._seen = 0
        self._arrived = 0
        self._ended = 0
        self._padding: PromptPadding | None = None
        self._summaries: dict[int, Any] = {}
        self._side = SideStream()
        self._is_compiled = False
        self.finite = FiniteCheck()

    @property
    def is_collecting(self) -> bool:
        """Whether a pass of the prompt is complete, and the prompt has not ended with it."""
        return self._seen > 0

    @property
    def is_over(self) -> bool:
        """Whether all layers have been selected from."""
        return self._ended == len(self._decoder.attention)

    def expect_candidates(self, storage: Storage) -> None:
        """The next pass holds candidates of assisted decoding behind the prompt; `storage` takes over what is kept."""
        self._has_candidates = True
        self._storage = storage

    def begin_pass(self, cache: Any, tokens: int, call: GenerateCall | None) -> None:
        """Prepares for a pass of so many tokens: puts the hooks on the model.

        Args:
            cache: the cache whose prompt it is.
            tokens: columns of the pass.
            call: the call of `generate` that the pass belongs to, if any.

        Raises:
            ValueError: the last pass did not come to its end, there are no tokens or more than were announced, or it
                cannot be known which of them are the prompt.
        """
        if self._arrived:
            raise ValueError("the cache holds part of a prompt whose prefill was interrupted; call reset()")
        if tokens == 0:
            raise ValueError("input_ids: the prompt is empty; at least one token is needed")
        self._end = self._end_of_prompt(tokens, call)
        if call is not None and not call.uses_cache:
            raise ValueError(
                "use_cache=False, in the call or in the model's generation_config: generate would pass the whole text "
                "to the cache at every step, with every cache; give use_cache=True"
            )
        self._hooks.attach(cache)

    def join(self) -> None:
        """Lets the device wait for a selection that runs beside the model's own work."""
        self._side.join()

    def _covers(self, columns: int) -> bool:
        return tokens_to_keep(self._settings.budget, columns) == columns

    def _end_of_prompt(self, tokens: int, call: GenerateCall | None) -> int | None:
        """How many columns the prompt has, or None if that is not known before its end."""
        seen, length = self._seen + tokens, self._settings.prompt_length
        if call is not None and call.prompt is not None:
            return call.prompt
        if self._has_candidates:
            raise ValueError(
                "assisted decoding by another loop than transformers' own: it cannot be known which tokens of the "
                "first pass are candidates; prefill the prompt before it, or decode without assistance"
            )
        if self._settings.prefill == "single":
            return seen
        if length is not None and seen > length:
            raise ValueError(f"prompt_length={length}, but the prompt has at least {seen} columns")
        if length is None and tokens == 1 and self.is_collecting:
            raise ValueError(
                'prefill="chunked": one token came after chunks of a prompt whose length is not known, and it may be '
                "its last chunk or the answer's first token: give prompt_length, or call end_prompt() before it"
            )
        return length

    def update(
        self, index: int, layer: SelectedLayer, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[SelectedLayer, Pair]:
        """Takes a layer's new tokens, and selects from its prompt if it is complete.

        Args:
            index: the layer's number.
            layer: what it has collected so far.
            keys, values: (B, H_kv, t, D), of the new tokens.

        Returns:
            The layer that takes the place of `layer`, and the keys and values that this pass attends to.

        Raises:
            ValueError: the layer was not seen, or the prompt is padded elsewhere than on the left.
        """
        tokens, seen = keys.shape[2], layer.seen + keys.shape[2]
        end = seen if self._end is None and self._settings.prefill == "single" else self._end
        ends = end is not None and seen >= end
        later = seen - end if ends and end is not None else 0
        mine = tokens - later
        is_kept_whole = ends and self._covers(layer.seen + mine)
        inputs = self._hooks.take(index)
        prompt = attended = keys, values
        if later:
            prompt = keys[:, :, :mine], values[:, :, :mine]
        if not is_kept_whole:
            inputs = self._with_padding(index, inputs, keys, seen, ends)
            self._fold(index, inputs.tokens(0, mine) if later else inputs)
        if layer.seen or not ends or is_kept_whole:
            prompt = layer.update(*prompt)
            attended = attended if later else prompt
        if ends:
            layer = self._select(index, layer, *prompt) if later else self._select_beside(index, layer, *prompt)
            if later:
                layer.update(keys[:, :, mine:], values[:, :, mine:])
        self._arrived += 1
        if self._arrived == len(self._decoder.attention):
            self._arrived, self._seen = 0, seen
        return layer, attended

    def finish(self, index: int, layer: SelectedLayer) -> SelectedLayer:
        """Ends the prompt in one layer, with what has been collected of it.

        Returns:
            The layer that takes the place of `layer`.
        """
        assert layer.keys is not None
        assert layer.values is not None
        return self._select(index, layer, layer.keys, layer.values)

    def _with_padding(
        self, index: int, inputs: LayerInput | None, keys: torch.Tensor, seen: int, ends: bool
    ) -> LayerInput:
        """The layer's inputs with the padding among its new tokens."""
        if inputs is None:
            self._hooks.detach()
            raise ValueError(
                f"model: layer {index} was not seen while it got its prompt.  Either the cache was built for "
                "another model than the one that is run (build it for this one), the model was given a 4-D "
                "attention_mask (give it the 2-D one), another prefill of the same model began before this one ended, "
                "or the model never asks its cache for get_mask_sizes"
            )
        if not self._arrived:
            self._padding = PromptPadding(inputs.mask, keys.shape[0], seen, keys.device)
        assert self._padding is not None
        # To look at the mask means to wait for the device: that is left for the end of the prompt.
        valid = self._padding.valid(keys.device) if ends else self._padding.unchecked(keys.device)
        if valid is None:
            return inputs
        valid = valid[:, -keys.shape[2] :]
        return LayerInput(inputs.hidden_states, inputs.positions, inputs.mask, valid)

    def _fold(self, index: int, inputs: LayerInput) -> None:
        """Adds new tokens to a layer's summary."""
        attention = self._decoder.attention[index]
        self._summaries[index] = self._method.observe(attention, inputs, self._summaries.get(index))

    def _select_beside(
        self, index: int, layer: SelectedLayer, keys: torch.Tensor, values: torch.Tensor
    ) -> SelectedLayer:
        """As `_select`, beside what the model does next."""
        module = self._decoder.attention[index].module
        # Where several processes share the model, what they send each other has not been tried beside it.
        is_shared = self._decoder.rank is not None
        if self._covers(keys.shape[2]) or is_shared or not takes_side_stream(module, keys, values):
            return self._select(index, layer, keys, values)
        assert self._padding is not None
        # What all layers share is made, and the mask is looked at, outside.
        self._padding.valid(keys.device)
        self.finite.flag(keys.device)
        if not self._side.has_time(keys.device):
            return self._select(index, layer, keys, values)
        with self._side.running(keys.device, keys, values, self._summaries[index]) as shared:
            selected = self._select(index, layer, keys, values)
            shared += selected.tensors
        return selected

    def _select(self, index: int, layer: SelectedLayer, keys: torch.Tensor, values: torch.Tensor) -> SelectedLayer:
        """Hands over to storage what is kept of a complete prompt."""
        tokens, take = keys.shape[2], None
        count = tokens_to_keep(self._settings.budget, tokens)
        if count < tokens:
            assert self._padding is not None
            valid = self._padding.valid(keys.device)
            valid = None if valid is None else valid[:, :tokens]
            take = partial(self._take, index, (keys, values, valid, self.finite.flag(keys.device)), count)
        selected = self._storage.store(index, layer, Selection(keys, values, count, take))
        self._summaries.pop(index, None)
        self._ended += 1
        return selected

    def _take(self, index: int, prompt: _Prompt, count: int, out: Pair | None) -> Taken:
        """Chooses `count` columns of a layer's prompt and copies them, to `out` if that is given."""
        keys, values, valid, not_finite = prompt
        method, attention, backend = self._method, self._decoder.attention[index], self._settings.backend

        def take(summary: Any, out: Pair | None) -> Taken:
            attended = attention.attended(keys, values)
            scores = checked_scores(method, method.score(attention, summary, *attended, valid), attended[0])
            scores = attention.of_stored(scores, keys.shape[1])
            kept = keep_best(scores, count, valid, not_finite=not_finite, backend=backend)
            refitted = None
            if not attention.stores_latents:
                refitted = method.refit(attention, summary, keys, values, kept, valid)
                refitted = checked_values(method, refitted, values, kept)
            copied = gather(keys, values, kept, out=out, valid=valid, not_finite=not_finite, backend=backend)
            return Taken(kept, *copied, refitted)

        def prepare_and_take(observed: Any, out: Pair | None) -> Taken:
            return take(method.prepare(attention, observed, valid), out)

        summary = self._summaries[index]
        if keys.device.type != "cuda" or attention.stores_latents:
            return prepare_and_take(summary, out)
        function: Callable[[Any, Pair | None], Taken] = prepare_and_take
        read = what_is_read(method, attention, summary)
        if read is None:
            function, summary = take, method.prepare(attention, summary, valid)
            read = what_is_read(method, attention, summary)
        if read is None:
            return take(summary, out)
        key = (method, backend, function is take, read.others, count, attention.scaling, attention.softcap)
        if not self._is_compiled and backend != "torch":
            self._is_compiled = True
            name = (str(method), *key[1:], keys.shape[1], keys.shape[3], keys.dtype, keys.device)
            compile_once(name, partial(function, copy(summary), out))
        inputs = (*read.tensors, *prompt, attention.sinks, *(out or (None, None)))
        found = self._decoder.replays.run(partial(function, summary, out), inputs, key, read.numbers)
        columns, kept_keys, kept_values, refitted = found
        assert columns is not None
        assert kept_keys is not None
        assert kept_values is not None
        return Taken(columns, kept_keys, kept_values, refitted)
