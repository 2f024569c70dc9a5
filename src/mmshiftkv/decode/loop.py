"""A decoding loop for `generate` that leaves the device nothing to wait for."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from ..cache import PrefillSelectionCache
from ..model.arguments import CACHE_ARGUMENT, CACHE_ARGUMENTS
from ..model.generation import streamer_of_generate
from .backend import decoding_backend
from .block_step import BlockStep, decoding_of
from .fitting import obstacle_to_blocks
from .step import Step, WholeStep

_logger = logging.getLogger(__name__)


def decode_ahead(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Greedy decoding or sampling: `model.generate(..., custom_generate=decode_ahead)`.

    `generate` prepares every step anew and waits for its token before it goes on; with a small cache that is a good
    part of a step.  This loop prepares once, and looks whether a step was the last one while the next already runs;
    what that one did is taken back then.  Where that cannot be, in models with layers of linear attention or
    convolution, it looks before the next one runs, with all else prepared.  Unless a `compile_config` is given, the
    step is compiled by `decoding_backend`.  Tokens are those of `generate` up to rounding: the model, logits processors
    and stopping criteria are the same.

    Args:
        model: the model.
        input_ids: (B, T), as `generate` passes them, like all that follows.
        logits_processor: changes logits before a token is chosen.
        stopping_criteria: say which rows have ended.
        generation_config: as prepared by `generate`.
        synced_gpus: must be False.
        streamer: gets each token, one step late.  `generate` has given it the prompt, and does not hand it over to a
            loop that is not its own: it is found in its frame.
        model_kwargs: inputs of the model, among them the cache.

    Returns:
        The sequences (B, T + new tokens), or with `return_dict_in_generate` them with scores, logits and the cache.

    Raises:
        ValueError: the cache is not one of this package that was built with `max_new_tokens` and can be compiled, what
            is asked for is neither greedy decoding nor sampling, or `input_ids` do not go on with the conversation that
            the cache holds.
    """
    return decode_with(
        _step_of,
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus,
        streamer,
        **model_kwargs,
    )


# (model, inputs of the first step, cache, generation_config, what else `generate` passes) -> the steps.
MakeStep = Callable[[PreTrainedModel, dict[str, Any], PrefillSelectionCache, GenerationConfig, dict[str, Any]], Step]


def decode_with(
    make_step: MakeStep,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """As `decode_ahead`, with steps of a given make."""
    cache = _checked_cache(model_kwargs, generation_config, synced_gpus)
    streamer = streamer or streamer_of_generate()
    loop = _Loop(input_ids, logits_processor, stopping_criteria, generation_config)
    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    loop.take(outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device))
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
    del outputs
    if not loop.is_full:
        inputs = model.prepare_inputs_for_generation(loop.ids, next_sequence_length=1, **model_kwargs)
        with model._optimize_model_for_decode():
            step = make_step(model, inputs, cache, generation_config, model_kwargs)
            _run_steps(step, loop, cache, streamer)
    loop.finish(streamer)
    return loop.result(cache)


def _step_of(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    cache: PrefillSelectionCache,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Step:
    if not model._valid_auto_compile_criteria(model_kwargs, generation_config):
        return WholeStep(model.__call__, inputs, cache)
    config = generation_config.compile_config
    if config is None:
        obstacle = obstacle_to_blocks(model, cache, inputs)
        if obstacle is None:
            return BlockStep(model, inputs, cache, decoding_of(model))
        _logger.info("a step of %s is compiled as a whole: %s", type(model).__name__, obstacle)
        config = CompileConfig(backend=decoding_backend, mode=None)
    return WholeStep(model.get_compiled_call(config), inputs, cache)


def _run_steps(step: Step, loop: "_Loop", cache: PrefillSelectionCache, streamer: BaseStreamer | None) -> None:
    # A token cannot be taken out of a state of all tokens again.
    can_undo = not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    is_first = True
    while is_first or not loop.is_full:
        # A step beyond the end is taken back, but is not worth a move to larger storage.
        if not is_first and not cache.has_room_for(1) and loop.has_ended():
            return
        if not is_first:
            step.prepare(loop.tokens)
        if not can_undo and loop.has_ended():
            return
        loop.take(step.logits())
        if loop.had_ended(streamer):
            loop.take_back(cache)
            return
        is_first = False


def _checked_cache(
    model_kwargs: dict[str, Any], generation_config: GenerationConfig, synced_gpus: bool
) -> PrefillSelectionCache:
    cache = next((model_kwargs[name] for name in CACHE_ARGUMENTS if model_kwargs.get(name) is not None), None)
    if not isinstance(cache, PrefillSelectionCache) or not cache.is_compileable:
        raise ValueError(
            f"decode_ahead needs a cache of mmshiftkv that was built with max_new_tokens, and nothing in the way of "
            f"compiling; got {type(cache).__name__}"
        )
    refused = {
        "num_beams": generation_config.num_beams not in (None, 1),
        "output_attentions": generation_config.output_attentions,
        "output_hidden_states": generation_config.output_hidden_states,
        "synced_gpus": synced_gpus,
    }
    found = [name for name, is_given in refused.items() if is_given]
    if found:
        raise ValueError(f"decode_ahead decodes greedily or samples; it does not take {', '.join(found)}")
    return cache


class _Loop:
    """The sequences so far, and what `generate` does to them between two steps."""

    def __init__(
        self,
        ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        self.ids = ids
        self._processor = logits_processor
        self._criteria = stopping_criteria
        self._config = config
        self._running = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        self._has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self._scores: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []
        self._ends: list[_StepEnd] = []

    @property
    def is_full(self) -> bool:
        """Whether the sequences are as long as they may become."""
        return self._criteria.max_length is not None and self.ids.shape[1] >= self._criteria.max_length

    def take(self, logits: torch.Tensor) -> None:
        """Chooses the next tokens, with nothing that waits for the device unless a stopping criterion does.

        Args:
            logits: (B, vocabulary), float32; they are kept.
        """
        config = self._config
        chosen = logits.to(self.ids.device)
        scores = self._processor(self.ids, chosen)
        if config.return_dict_in_generate and config.output_logits:
            self._logits.append(chosen)
        if config.return_dict_in_generate and config.output_scores:
            self._scores.append(scores)
        if config.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self._has_end:
            tokens = tokens * self._running + config._pad_token_tensor.to(tokens.device) * (1 - self._running)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self._running = self._running & ~self._criteria(self.ids, scores)
        self._ends.append(_StepEnd(self._running.max() == 0, tokens))

    @property
    def tokens(self) -> torch.Tensor:
        """The last tokens, (B, 1)."""
        return self.ids[:, -1:]

    def had_ended(self, streamer: BaseStreamer | None) -> bool:
        """Whether the step before the last one was the end."""
        return self._ends.pop(0).read(streamer)

    def has_ended(self) -> bool:
        """Whether the last step was the end; waits for it."""
        return self._ends[-1].has_ended()

    def take_back(self, cache: PrefillSelectionCache) -> None:
        """Undoes the last step."""
        self.ids = self.ids[:, :-1]
        self._ends.clear()
        for kept in (self._scores, self._logits):
            del kept[-1:]
        cache.crop(-1)

    def finish(self, streamer: BaseStreamer | None) -> None:
        """Waits for what has not been looked at."""
        for end in self._ends:
            end.read(streamer)
        if streamer is not None:
            streamer.end()

    def result(self, cache: PrefillSelectionCache) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """What `generate` returns."""
        if not self._config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=self.ids,
            scores=tuple(self._scores) if self._config.output_scores else None,
            logits=tuple(self._logits) if self._config.output_logits else None,
            **{CACHE_ARGUMENT: cache},
        )


class _StepEnd:
    """Whether a step was the last one, and its tokens for a streamer.

    On a GPU the answer is copied to the host while the next step runs; to read it waits for the copy.
    """

    def __init__(self, has_ended: torch.Tensor, tokens: torch.Tensor) -> None:
        self._has_ended = has_ended
        self._tokens = tokens
        self._event: torch.cuda.Event | None = None
        if has_ended.device.type == "cuda":
            self._has_ended = torch.empty_like(has_ended, device="cpu", pin_memory=True)
            self._has_ended.copy_(has_ended, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(has_ended.device))

    def has_ended(self) -> bool:
        """Whether it was the last step."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._has_ended)

    def read(self, streamer: BaseStreamer | None) -> bool:
        """As `has_ended`; gives the tokens to a streamer."""
        if streamer is not None:
            streamer.put(self._tokens.cpu())
        return self.has_ended()
