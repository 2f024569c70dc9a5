"""A document that is read once and asked many times."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache import PrefillSelectionCache
from ..joining import join
from ..model.arguments import CACHE_ARGUMENT
from ..model.offload import device_of
from ..registry import CACHES
from ..report import CacheReport
from ..saving import SavedCache, read, write
from .ending import Ending
from .media import checked_images, checked_question, checked_videos
from .positions import Offsets, joined_offsets, offsets_of, put_back
from .settings import Answering, new_cache
from .template import PLACEHOLDER, ChatTemplate, NewTokens
from .transcript import Transcript
from .worker import submit


class Document:
    """Images, videos or a text, compressed before any question is known, and asked as often as wanted.

    Each question is answered on a copy; the document stays as it was.  Several questions, and several documents
    (`ask_each`), are one batch.

    Args:
        model: the model that answers.
        processor: that of the model; for a text model its tokenizer.
        images: the pages: an image or several.
        videos: several, each a list of frames.
        text: what stands behind the images.
        budget: tokens that are kept per KV head and layer (int), or the share of them (float).
        method: the name of the method, as for `make_cache`.
        cache_settings: what the cache takes besides, such as `{"preset": "value-aware"}`.
        system: what the system message says.
        max_new_tokens: tokens of an answer at most.
        stop: an answer ends behind any of these texts, which stay part of it.
        max_length: tokens of document, question and answer at most; by default what the model has positions for.
        decode_ahead: whether storage is fixed and `decode_ahead` decodes; None: on a GPU.
        options: of `generate`, such as `do_sample` and `temperature`.

    Raises:
        TypeError, ValueError: nothing to read, something that is no image, an unsupported model or one with layers of
            other kinds than full attention, the processor of another one, or a bad setting.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        images: Any = None,
        *,
        videos: Any = None,
        text: str | None = None,
        budget: int | float,
        method: str = "shiftkv",
        cache_settings: Mapping[str, Any] | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        max_length: int | None = None,
        decode_ahead: bool | None = None,
        **options: Any,
    ) -> None:
        self._answering = Answering.checked(
            model, max_new_tokens=max_new_tokens, stop=stop, max_length=max_length, options=options
        )
        pages, films = checked_images(images), checked_videos(videos)
        if not (pages or films or text):
            raise ValueError("images: a document needs at least one image, a video or a text")
        # What decides the storage of copies; the document itself is small, and grows no more.
        self._is_ahead = new_cache(model, method, budget, cache_settings, 1, decode_ahead).is_compileable
        cache = new_cache(model, method, budget, cache_settings, 1, decode_ahead=False)
        self._model = model
        self._template = ChatTemplate(model, processor)
        behind = PLACEHOLDER if text is None else f"{checked_question(text, 'text')}\n\n{PLACEHOLDER}"
        message = self._template.message("user", behind, pages, films)
        before, found, self._behind = self._template.render([*self._template.system(system), message]).partition(
            PLACEHOLDER
        )
        if not found:
            raise ValueError("processor: its chat template leaves out what is asked")
        new = self._template.tokens([before], [message], is_first=True)
        check_fits(self._answering, new.ids.shape[1])
        self._held = submit(model, lambda: _prefilled(model, cache, new)).result()

    @property
    def cache(self) -> PrefillSelectionCache:
        """The cache that holds the document, to look at."""
        return self._held.cache

    def report(self) -> CacheReport:
        """Tokens and bytes that the document's cache holds."""
        return self._held.cache.report()

    def ask(self, questions: str | Sequence[str], **options: Any) -> Any:
        """The answers, without white space around them: a text for a text, a list for several.

        Args:
            questions: one or several; several are one batch.
            options: other `max_new_tokens`, `stop` and options of `generate` for these answers.

        Raises:
            TypeError, ValueError: a question of no words, no questions, an option that is not for one answer each, or a
                question that does not fit.
        """
        if isinstance(questions, str):
            return Document.ask_each([self], [questions], **options)[0]
        questions = list(questions)
        return Document.ask_each([self] * len(questions), questions, **options)

    @staticmethod
    def ask_each(documents: Sequence["Document"], questions: str | Sequence[str], **options: Any) -> list[str]:
        """The answers of several documents, in one batch of their joined caches.

        Args:
            documents: of one model, with one method, budget and chat template.
            questions: one for each document, or one text for all.
            options: as for `ask`; other settings are those of the first document.

        Raises:
            TypeError, ValueError: as `ask`, another number of questions, or documents that cannot be joined.
        """
        documents = list(documents)
        questions = [questions] * len(documents) if isinstance(questions, str) else list(questions)
        if not documents or len(documents) != len(questions):
            raise ValueError(f"questions holds {len(questions)} texts for {len(documents)} documents")
        texts = [
            checked_question(text, f"questions[{row}]") + document._behind
            for row, (document, text) in enumerate(zip(documents, questions, strict=True))
        ]
        first = documents[0]
        answering = first._answering.changed(options)
        new = first._template.tokens(texts, [], is_first=False)
        tokens = new.ids.shape[1] + answering.max_new_tokens
        check_fits(answering, max(document._held.width for document in documents) + tokens)
        # A power of two, so that questions of other lengths find the same storage, and what was compiled for it.
        room = 1 << (tokens - 1).bit_length() if first._is_ahead else None
        batch = _joined([document._held for document in documents], room)
        criteria = answering.options.get("stopping_criteria") or ()
        ending = Ending(first._template.tokenizer, answering.stop, criteria)
        given = {"max_new_tokens": answering.max_new_tokens, **answering.options}
        given.pop("stopping_criteria", None)
        ends = answering.end_tokens(first._model)
        turn = submit(first._model, lambda: batch.answer(new, ending, given, ends))
        try:
            return [first._template.read(ids).strip() for ids in turn.result()]
        except KeyboardInterrupt:
            ending.cancel()
            turn.exception()
            raise

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the document into a file, safetensors with JSON in its metadata.

        Settings of `generate` that are no numbers, texts or lists of them are not saved: ValueError.
        """
        held, answering = self._held, self._answering
        assert held.ids is not None
        assert held.offsets is not None
        saved = held.cache.saved()
        tensors = {"ids": held.ids}
        tensors |= {f"offsets.{place}": part for place, part in enumerate(held.offsets) if part is not None}
        notes = {
            "behind": self._behind,
            "processor": self._template.fingerprint(),
            "max_new_tokens": answering.max_new_tokens,
            "stop": answering.stop,
            "max_length": answering.max_length,
            "options": dict(answering.options),
        }
        try:
            json.dumps(notes)
        except TypeError as error:
            raise ValueError(f"options of generate cannot be saved: {error}") from error
        write(
            path,
            SavedCache(saved.kind, saved.settings, saved.fingerprint, saved.layers, saved.prompt_ids, tensors, notes),
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        processor: Any,
        *,
        decode_ahead: bool | None = None,
    ) -> "Document":
        """The document that was saved; it gives the same answers bit by bit.

        Args:
            path: a file of `save`.
            model: the model that it was saved with.
            processor: that of the model.
            decode_ahead: as for a new document.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of a newer version, no document, or of another model or processor.
        """
        saved = read(path)
        if "behind" not in saved.notes:
            raise ValueError(f"{path}: holds a cache, not a document; use {saved.kind}.load")
        kinds = {cache.__name__: (name, cache) for name, cache in CACHES.items()}
        if saved.kind not in kinds:
            raise ValueError(f"{path}: its method {saved.kind} is not registered; see register_method")
        document = cls.__new__(cls)
        document._model, document._template = model, ChatTemplate(model, processor)
        method, kind = kinds[saved.kind]
        cache = kind.of_saved(saved, path, model)
        if saved.notes["processor"] != document._template.fingerprint():
            raise ValueError(f"{path}: saved with another processor, or with another chat template")
        probe = new_cache(model, method, 1.0, None, 1, decode_ahead)
        document._is_ahead = probe.is_compileable
        document._behind = saved.notes["behind"]
        names = ("max_new_tokens", "stop", "max_length", "options")
        document._answering = Answering.checked(model, **{name: saved.notes[name] for name in names})
        device = device_of(model)
        ids = saved.tensors["ids"].to(device)
        offsets = tuple(
            saved.tensors[name].to(device) if name in saved.tensors else None
            for name in (f"offsets.{place}" for place in range(len(offsets_of(model))))
        )
        document._held = Transcript(model, cache, ids, torch.ones_like(ids), offsets)
        return document


def check_fits(answering: Answering, tokens: int) -> None:
    """Raises ValueError for more tokens than the model, or `max_length`, has room for."""
    if tokens > answering.max_length:
        raise ValueError(f"it does not fit: {tokens} tokens are more than max_length={answering.max_length}")


@torch.no_grad()
def _prefilled(model: PreTrainedModel, cache: PrefillSelectionCache, new: NewTokens) -> Transcript:
    put_back(model, None)
    inputs = {"input_ids": new.ids, "attention_mask": new.mask, **new.types, **new.media}
    model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)
    cache.held_layers()  # raises where copies could not be joined
    return Transcript(model, cache, new.ids, new.mask, offsets_of(model))


def _joined(parts: Sequence[Transcript], room: int | None) -> Transcript:
    """Several single rows as one batch, of copies."""
    width = max(part.width for part in parts)
    columns: list[list[torch.Tensor]] = [[], []]
    offsets: list[Offsets] = []
    for part in parts:
        assert part.ids is not None
        assert part.mask is not None
        assert part.offsets is not None
        for pieces, piece in zip(columns, (part.ids, part.mask), strict=True):
            pieces.append(torch.nn.functional.pad(piece, (width - part.width, 0)))
        offsets.append(part.offsets)
    cache = join([part.cache for part in parts], max_new_tokens=room)
    return Transcript(parts[0].model, cache, torch.cat(columns[0]), torch.cat(columns[1]), joined_offsets(offsets))
