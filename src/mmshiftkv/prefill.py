"""One prompt, from its first token to its selection."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from shiftkv_kernels import keep_best

from .checks import tokens_to_keep
from .methods.base import Method, checked_scores, checked_values
from .model.decoder import Decoder
from .model.hooks import LayerInput, PrefillHooks
from .model.padding import PromptPadding
from .storage.base import Pair, SelectedLayer, Selection, Storage

# While the last tokens may be taken back (assisted decoding: they are candidates), so many of them stay as they were
# seen; a method's summary of tokens cannot be undone.
_MOST_CANDIDATES = 256


@dataclass(frozen=True)
class PromptSettings:
    """How prompts come, and what is kept of them.

    Attributes:
        budget: tokens kept per KV head and layer (int), or the share of the prompt's columns (float), rounded up.
        prefill: "single" if a prompt comes in one forward pass, "chunked" if in several.
        prompt_length: columns of the whole prompt, for "chunked"; None: the first one-token pass ends the prompt.
        backend: "auto", "triton" or "torch".
    """

    budget: int | float
    prefill: str
    prompt_length: int | None
    backend: str


class Prefill:
    """A prompt that is being prefilled, from its first forward pass until all layers have been selected from.

    Each pass is announced (`begin_pass`) and then comes layer by layer (`update`).  A prompt ends with its only pass,
    with the pass that completes its announced length, or by `finish`.

    Args:
        settings: how the prompt comes.
        decoder: the model's decoder.
        hooks: show what the layers see.
        method: scores the prompt's tokens.
        storage: takes over what is kept.
    """

    def __init__(
        self, settings: PromptSettings, decoder: Decoder, hooks: PrefillHooks, method: Method, storage: Storage
    ) -> None:
        self._settings = settings
        self._decoder = decoder
        self._hooks = hooks
        self._method = method
        self._storage = storage
        self._may_shrink = False
        self._seen = 0
        self._arrived = 0
        self._ended = 0
        self._padding: PromptPadding | None = None
        self._summaries: dict[int, Any] = {}
        self._tails: dict[int, LayerInput] = {}

    @property
    def seen(self) -> int:
        """Columns of the prompt so far."""
        return self._seen

    @property
    def is_collecting(self) -> bool:
        """Whether a pass of the prompt is complete, and the prompt has not ended with it."""
        return self._seen > 0

    @property
    def is_over(self) -> bool:
        """Whether all layers have been selected from."""
        return self._ended == len(self._decoder.attention)

    def expect_candidates(self, storage: Storage) -> None:
        """The last tokens of the prompt may be taken back; `finish` ends it, and `storage` takes over what is kept."""
        self._may_shrink = True
        self._storage = storage

    def is_followed_by(self, tokens: int) -> bool:
        """Whether a pass of so many tokens comes after the prompt, not in it.

        Raises:
            ValueError: the last pass did not come to its end.
        """
        if self._arrived:
            raise ValueError("the cache holds part of a prompt whose prefill was interrupted; call reset()")
        if not self.is_collecting:
            return False
        may_go_on = self._settings.prompt_length is not None or tokens > 1
        return not (self._settings.prefill == "chunked" and may_go_on)

    def begin_pass(self, cache: Any, tokens: int) -> None:
        """Prepares for a pass of so many tokens: puts the hooks on the model.

        Raises:
            ValueError: there are none, or more than were announced.
        """
        if tokens == 0:
            raise ValueError("input_ids: the prompt is empty; at least one token is needed")
        length, chunk = self._settings.prompt_length, self._decoder.prefill_chunk_size
        if length is not None and self._seen + tokens > length:
            raise ValueError(f"prompt_length={length}, but the prompt has at least {self._seen + tokens} columns")
        if self._settings.prefill == "single" and chunk is not None:
            raise ValueError(
                f'prefill="single", but the model\'s generation_config sets prefill_chunk_size={chunk}: '
                'build the cache with prefill="chunked"'
            )
        self._hooks.attach(cache)

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
        seen = layer.seen + keys.shape[2]
        ends = not self._may_shrink and (self._settings.prefill == "single" or seen == self._settings.prompt_length)
        inputs = self._inputs_of(index, keys, seen, ends)
        is_kept_whole = ends and tokens_to_keep(self._settings.budget, seen) == seen
        if layer.seen or not ends or is_kept_whole:
            keys, values = layer.update(keys, values)
        if not is_kept_whole:
            self._summarize(index, inputs)
        if ends:
            layer = self._select(index, layer, keys, values)
        self._arrived += 1
        if self._arrived == len(self._decoder.attention):
            self._arrived, self._seen = 0, seen
        return layer, (keys, values)

    def finish(self, index: int, layer: SelectedLayer) -> SelectedLayer:
        """Ends the prompt in one layer: the layer that takes its place."""
        assert layer.allocated is not None
        keys, values = (part[:, :, : layer.stored] for part in layer.allocated)
        return self._select(index, layer, keys, values)

    def take_back(self, tokens: int) -> None:
        """Forgets the last tokens of the prompt.

        Raises:
            ValueError: they are part of a summary already; nothing is changed then.
        """
        tails = self._tails.values()
        known = min((tail.hidden_states.shape[1] for tail in tails), default=0)
        if tokens and tokens >= known:
            raise ValueError(
                f"tokens_to_remove={-tokens}: the prompt is not selected from yet, and only {max(known - 1, 0)} of its "
                "last tokens can be removed"
            )
        self._tails = {index: tail.tokens(0, known - tokens) for index, tail in self._tails.items()}
        if self._padding is not None:
            self._padding.take_back(tokens)
        self._seen -= tokens

    def _inputs_of(self, index: int, keys: torch.Tensor, seen: int, ends: bool) -> LayerInput:
        inputs = self._hooks.take(index)
        if inputs is None:
            self._hooks.detach()
            raise ValueError(
                f"model: layer {index} was not seen while it got its prompt.  Either the cache was built for "
                "another model than the one that is run (build it for this one), or the model was given a 4-D "
                "attention_mask (give it the 2-D one)"
            )
        if not self._arrived:
            self._padding = PromptPadding(inputs.mask, keys.shape[0], seen, keys.device)
        assert self._padding is not None
        # To look at the mask means to wait for the device: that is left for the end of the prompt.
        valid = self._padding.valid(keys.device) if ends else self._padding.unchecked(keys.device)
        return replace(inputs, valid=None if valid is None else valid[:, -keys.shape[2] :])

    def _summarize(self, index: int, inputs: LayerInput) -> None:
        """Adds new tokens to the layer's summary, but for those that may be taken back."""
        if not self._may_shrink:
            self._fold(index, inputs)
            return
        self._fold(index, self._tails.pop(index, None))
        tokens = inputs.hidden_states.shape[1]
        sure = max(tokens - _MOST_CANDIDATES, 0)
        if sure:
            self._fold(index, inputs.tokens(0, sure))
        self._tails[index] = inputs.tokens(sure, tokens).copied()

    def _fold(self, index: int, inputs: LayerInput | None) -> None:
        if inputs is not None:
            attention = self._decoder.attention[index]
            self._summaries[index] = self._method.observe(attention, inputs, self._summaries.get(index))

    def _select(self, index: int, layer: SelectedLayer, keys: torch.Tensor, values: torch.Tensor) -> SelectedLayer:
        """Hands over to storage what is kept of a complete prompt."""
        assert self._padding is not None
        valid = self._padding.valid(keys.device)
        kept = refitted = None
        count = tokens_to_keep(self._settings.budget, keys.shape[2])
        if count < keys.shape[2]:
            self._fold(index, self._tails.pop(index, None))
            attention, summary = self._decoder.attention[index], self._summaries[index]
            scores = checked_scores(self._method, self._method.score(attention, summary, keys, values, valid), keys)
            kept = keep_best(scores, count, valid, backend=self._settings.backend)
            refitted = self._method.refit(attention, summary, keys, values, kept, valid)
            refitted = checked_values(self._method, refitted, values, kept)
        self._summaries.pop(index, None)
        self._tails.pop(index, None)
        self._ended += 1
        return self._storage.store(index, layer, Selection(kept, keys, values, refitted))
