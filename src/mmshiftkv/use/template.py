"""From messages to tokens, by a processor's chat template: a first prompt, and what comes behind an answer."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..model.offload import device_of

# Stands for a text that is not there yet.  No template changes it, and nobody writes it.
PLACEHOLDER = "mmshiftkv0placeholder0mmshiftkv"
Message = dict[str, Any]


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a model has not seen yet, left-padded.

    Attributes:
        ids: (B, t) int64.
        mask: (B, t) int64, 0 for padding.
        types: what else there is for each token, by the name of the model's argument.
        media: images and videos, by the name of the model's argument.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    types: dict[str, torch.Tensor] = field(default_factory=dict)
    media: dict[str, torch.Tensor] = field(default_factory=dict)


class ChatTemplate:
    """The chat template of a processor, or of a tokenizer, and what belongs to it.

    Args:
        model: the model that reads the tokens.
        processor: that of the model.

    Raises:
        TypeError, ValueError: it has no chat template, or is the processor of another model.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        if not hasattr(processor, "apply_chat_template"):
            raise TypeError(f"processor is a {type(processor).__name__}: give the model's processor, or its tokenizer")
        self._model = model
        self._processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes = {kind for kind in ("image", "video") if getattr(processor, f"{kind}_processor", None) is not None}
        self._sees = hasattr(processor, "image_processor")
        if not (getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)):
            raise ValueError(f"processor: {type(processor).__name__} has no chat template")
        self._check_model()

    def _check_model(self) -> None:
        name, config = type(self._processor).__name__, self._model.config
        embedded = self._model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > embedded:
            raise ValueError(
                f"processor: {name} is of another model: it has {len(self.tokenizer)} tokens, the model {embedded}"
            )
        theirs = getattr(self._processor, "image_token_id", None) if self._sees else None
        mine = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if theirs is not None and theirs != mine:
            raise ValueError(
                f"processor: {name} is of another model: its images are token {theirs}, the model's token {mine}"
            )

    def fingerprint(self) -> str:
        """Tells the processor from another one: of its kind, tokens, chat template and image settings."""
        template = getattr(self._processor, "chat_template", None) or self.tokenizer.chat_template
        settings = [
            getattr(self._processor, f"{kind}_processor").to_dict() for kind in ("image", "video") if kind in self.takes
        ]
        known = [type(self._processor).__name__, len(self.tokenizer), self.tokenizer.get_vocab(), template, settings]
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    def message(self, role: str, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Message:
        """A message as templates take it.

        Raises:
            ValueError: the processor takes no images, or no videos.
        """
        for kind, given in (("image", images), ("video", videos)):
            if given and kind not in self.takes:
                raise ValueError(f"{kind}s: {type(self._processor).__name__} takes no {kind}s")
        if not self._sees:
            return {"role": role, "content": text}
        content = [{"type": "image", "image": image} for image in images]
        content += [{"type": "video", "video": video} for video in videos]
        return {"role": role, "content": [*content, {"type": "text", "text": text}]}

    def system(self, text: str | None) -> list[Message]:
        """The messages that every conversation begins with.

        Raises:
            ValueError: the template leaves a system message out.
        """
        if text is None:
            return []
        messages = [self.message("system", text)]
        if text not in self.render([*messages, self.message("user", PLACEHOLDER)]):
            raise ValueError(f"system={text!r}: this processor's chat template leaves a system message out")
        return messages

    def render(self, messages: Sequence[Message]) -> str:
        """The text of messages, up to where an answer begins."""
        return self._processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def behind_answer(self, messages: Sequence[Message]) -> str:
        """The text that comes behind the last answer in `messages`, up to where the next one begins.

        Raises:
            ValueError: the template leaves the answer out.
        """
        last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
        known = [*messages[:last], self.message("assistant", PLACEHOLDER), *messages[last + 1 :]]
        _, found, text = self.render(known).rpartition(PLACEHOLDER)
        if not found:
            raise ValueError("processor: its chat template leaves out what the assistant has answered")
        return text

    def tokens(self, texts: Sequence[str], messages: Sequence[Message], *, is_first: bool) -> NewTokens:
        """The tokens of one text for each row.

        Args:
            texts: with the placeholders of the images and videos in `messages`.
            messages: those of all rows that are new.
            is_first: whether the texts begin conversations; else they go on with one, and nothing is put in front.

        Raises:
            ValueError: the template left images or videos out.
        """
        # Behind a token of their own, words are split as in the middle of a text.
        anchor = "" if is_first else self.tokenizer.eos_token or ""
        starts = bool(self.tokenizer.bos_token) and texts[0].startswith(self.tokenizer.bos_token)
        options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
        options["add_special_tokens"] = is_first and not starts
        media = {f"{kind}s": _given(messages, kind) for kind in ("image", "video")}
        media = {kind: given for kind, given in media.items() if given}
        made = dict(self._processor(text=[anchor + text for text in texts], **media, **options))
        ids, mask = made.pop("input_ids"), made.pop("attention_mask")
        if anchor:
            length = len(self.tokenizer(anchor, add_special_tokens=False)["input_ids"])
            mask = mask * (mask.cumsum(-1) > length)
        first = int((mask.sum(0) > 0).int().argmax())
        types = {name: part[:, first:] for name, part in made.items() if _is_of_tokens(part, ids)}
        rest = {name: part for name, part in made.items() if name not in types}
        if media and not rest:
            raise ValueError(f"{', '.join(media)}: the chat template left them out")
        move = device_of(self._model), self._model.dtype
        return NewTokens(
            ids[:, first:].to(move[0]),
            mask[:, first:].to(move[0]),
            {name: part.to(move[0]) for name, part in types.items()},
            {name: _moved(part, *move) for name, part in rest.items()},
        )

    def read(self, ids: torch.Tensor) -> str:
        """The text of an answer's tokens (t,)."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _given(messages: Sequence[Message], kind: str) -> list[Any]:
    return [
        part[kind]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == kind
    ]


def _is_of_tokens(part: Any, ids: torch.Tensor) -> bool:
    return isinstance(part, torch.Tensor) and part.shape == ids.shape and not part.is_floating_point()


def _moved(part: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(part, torch.Tensor):
        return part
    return part.to(device, dtype) if part.is_floating_point() else part.to(device)
