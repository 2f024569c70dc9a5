"""How answers are made: options of `generate`, where answers end, and which cache and decoding loop serve them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..cache import PrefillSelectionCache
from ..checks import check_integer
from ..registry import make_cache

# Given by the conversation itself, or of no use to it.
_OWN = ("cache", "past_key_values", "input_ids", "inputs", "attention_mask", "streamer", "custom_generate", "tokenizer")
_ONE_ROW = ("num_beams", "num_return_sequences")
_OTHER = ("assistant_model", "prompt_lookup_num_tokens", "return_dict_in_generate", "use_cache", "prefill_chunk_size")


@dataclass(frozen=True)
class Answering:
    """How answers are made.

    Attributes:
        max_new_tokens: tokens of an answer at most.
        stop: an answer ends behind any of these texts.
        max_length: columns that a conversation has at most.
        options: of `generate`.
    """

    max_new_tokens: int
    stop: tuple[str, ...]
    max_length: int
    options: Mapping[str, Any]

    @classmethod
    def checked(
        cls,
        model: PreTrainedModel,
        *,
        max_new_tokens: int,
        stop: str | Sequence[str],
        max_length: int | None,
        options: Mapping[str, Any],
    ) -> "Answering":
        """Raises TypeError or ValueError, naming the argument, for what does not do."""
        check_integer("max_new_tokens", max_new_tokens, minimum=1)
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if max_length is None:
            max_length = positions or 2**31
        check_integer("max_length", max_length, minimum=1)
        return cls(max_new_tokens, _texts(stop), max_length, checked_options(options))

    def changed(self, options: Mapping[str, Any]) -> "Answering":
        """With other settings for one turn."""
        options = dict(options)
        tokens, stop = options.pop("max_new_tokens", self.max_new_tokens), options.pop("stop", self.stop)
        check_integer("max_new_tokens", tokens, minimum=1)
        merged = {**self.options, **checked_options(options)}
        return replace(self, max_new_tokens=tokens, stop=_texts(stop), options=merged)

    def end_tokens(self, model: PreTrainedModel) -> list[int]:
        """The ids that end an answer."""
        ends = self.options.get("eos_token_id", getattr(model.generation_config, "eos_token_id", None))
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `generate`, without those that one answer to a turn has no use for.

    Raises:
        ValueError: one of these; the message says why.
    """
    for name in options:
        if name in _OWN:
            raise ValueError(f"{name} is given to generate by the conversation itself")
        if name in _OTHER or (name in _ONE_ROW and options[name] not in (None, 1)):
            raise ValueError(f"{name}={options[name]!r}: not for conversations, whose turns have one answer each")
    return dict(options)


def new_cache(
    model: PreTrainedModel,
    method: str,
    budget: int | float,
    settings: Mapping[str, Any] | None,
    room: int,
    decode_ahead: bool | None,
) -> PrefillSelectionCache:
    """The cache of a conversation: in fixed storage if it is decoded ahead, which None leaves to the device.

    Raises:
        TypeError, ValueError: as the cache, or `decode_ahead` is asked for and cannot be done.
    """
    if method == "full":
        raise ValueError('method="full" has no cache that is compressed; budget=1.0 keeps whole prompts')
    ahead = model.device.type == "cuda" if decode_ahead is None else decode_ahead
    given = dict(settings or {})
    with warnings.catch_warnings():
        # That nothing is reserved matters to those only who asked for it.
        warnings.filterwarnings("ignore", message="max_new_tokens=.* reserves nothing")
        cache: Any = make_cache(method, model, budget, **({"max_new_tokens": room} if ahead else {}), **given)
    if decode_ahead and not cache.is_compileable:
        raise ValueError("decode_ahead=True: this model's decoding cannot be compiled (docs/models.md says when)")
    return cache


def _texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop={stop!r} must be a text or several, none of them empty")
    return texts
