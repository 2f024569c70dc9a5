"""A conversation about images, turn by turn, over any supported model and its processor."""

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from transformers import PreTrainedModel

from ..cache import PrefillSelectionCache
from ..model.parallel import rank_of
from ..report import CacheReport
from .ending import Ending
from .media import checked_images, checked_question, checked_videos
from .settings import Answering, new_cache
from .streaming import AnswerStream
from .template import ChatTemplate, Message, NewTokens
from .transcript import Transcript
from .worker import submit

_TURNS_OF_ROOM = 4


class Conversation:
    """Asks a model about images, turn by turn, with a compressed cache.

    The first turn is compressed: its images, and what else it says.  Later turns are stored whole, images included: a
    cache selects from one prompt only (docs/conversations.md).  A turn that fails leaves the conversation as it was.

    All turns of a model run in one thread, one after the other, and each conversation puts its own positions back
    before its turn; so several conversations may go on in turn, or in threads.

    Args:
        model: the model that answers.
        processor: that of the model; for a text model its tokenizer.
        budget: tokens of the first turn that are kept per KV head and layer (int), or the share of them (float).
        method: the name of the method, as for `make_cache`.
        cache_settings: what the cache takes besides, such as `{"preset": "value-aware"}`.
        system: what the system message says.
        max_new_tokens: tokens of an answer at most.
        stop: an answer ends behind any of these texts, which stay part of it.
        max_length: tokens of all turns at most; by default what the model has positions for.
        decode_ahead: whether storage is fixed and `decode_ahead` decodes; None: on a GPU.
        options: of `generate`, such as `do_sample` and `temperature`.

    Raises:
        TypeError, ValueError: the model is not supported, the processor is of another model, or a bad setting.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
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
        room = _TURNS_OF_ROOM * max_new_tokens
        cache = new_cache(model, method, budget, cache_settings, room, decode_ahead)
        self._model = model
        self._template = ChatTemplate(model, processor)
        self._system = self._template.system(system)
        self._transcript = Transcript(model, cache)
        self._rows: list[list[Message]] = []
        self._is_batch = False
        self._turn: Future[Any] | None = None

    @property
    def messages(self) -> Any:
        """All messages so far, as chat templates take them; in a batch a list of them for each row.

        They hold the images, and answers with all white space.
        """
        rows = [list(row) for row in self._rows]
        return rows if self._is_batch else (rows[0] if rows else list(self._system))

    @property
    def cache(self) -> PrefillSelectionCache:
        """The cache that holds the conversation, to look at."""
        return self._transcript.cache

    def report(self) -> CacheReport:
        """Tokens and bytes that the cache holds."""
        return self._transcript.cache.report()

    def ask(
        self,
        question: str | Sequence[str],
        *,
        images: Any = None,
        videos: Any = None,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """The answer, without white space around it; with `stream` an iterator over its pieces.

        Args:
            question: what is asked; several texts are a batch of conversations, each with its own.
            images: an image or several, shown before the question; in a batch a list of such for each row, or None.
            videos: several videos, each a list of frames; in a batch as `images`.
            stream: give the pieces of the answer as they come.  The turn has begun when this returns, and comes to its
                end whether they are read or not; `close()` of the iterator ends it early, but for a model that
                several processes share.
            options: other `max_new_tokens`, `stop` and options of `generate` for this turn.

        Raises:
            TypeError, ValueError: a question of no words, something that is no image, an option that is not for
                conversations, another number of questions than there are rows, or a turn that does not fit.
            RuntimeError: a turn is running.
        """
        self._check_idle("ask")
        answering = self._answering.changed(options)
        asked = self._asked(question, images, videos, stream)
        new = self._new_tokens(asked)
        self._check_fits(new, answering)
        ending = Ending(self._template.tokenizer, answering.stop, answering.options.get("stopping_criteria") or ())
        is_batch = not isinstance(question, str)

        def start(streamer: Any = None) -> Future[Any]:
            self._turn = submit(self._model, lambda: self._take_turn(asked, new, ending, answering, is_batch, streamer))
            return self._turn

        if stream:
            return AnswerStream(start, self._template.tokenizer, ending, rank_of(self._model))
        turn = start()
        try:
            answers = turn.result()
        except KeyboardInterrupt:
            ending.cancel()
            turn.exception()
            raise
        return answers if is_batch else answers[0]

    def fork(self) -> "Conversation":
        """A conversation that begins with this one and goes its own way; the images are not read again.

        Raises:
            RuntimeError: a turn is running.
        """
        self._check_idle("fork")
        twin = copy.copy(self)
        twin._transcript = self._transcript.copied()
        twin._rows = [list(row) for row in self._rows]
        twin._turn = None
        return twin

    def reset(self) -> None:
        """Forgets all turns; settings and the system message stay.

        Raises:
            RuntimeError: a turn is running.
        """
        self._check_idle("reset")
        cache = self._transcript.cache
        cache.reset()
        self._transcript = Transcript(self._model, cache)
        self._rows, self._is_batch = [], False

    def _check_idle(self, what: str) -> None:
        if self._turn is not None and not self._turn.done():
            raise RuntimeError(f"cannot {what}: a turn of this conversation is running; read its stream to the end")

    def _asked(self, question: Any, images: Any, videos: Any, stream: bool) -> list[Message]:
        """The new message of each row."""
        if not isinstance(question, Sequence):
            raise TypeError(f"question is a {type(question).__name__}: give a text, or several for a batch")
        if isinstance(question, str):
            rows = [(question, images, videos)]
        else:
            questions = list(question)
            if stream:
                raise ValueError("stream=True is for one conversation, not for a batch")
            given = [list(part) if part is not None else [None] * len(questions) for part in (images, videos)]
            if not questions or any(len(part) != len(questions) for part in given):
                raise ValueError(
                    f"question holds {len(questions)} texts, images {len(given[0])}, videos {len(given[1])}: "
                    "one for each row"
                )
            rows = list(zip(questions, *given, strict=True))
        is_batch = not isinstance(question, str)
        if self._rows and (len(rows) != len(self._rows) or is_batch != self._is_batch):
            mine = f"a batch of {len(self._rows)}" if self._is_batch else "one conversation"
            raise ValueError(f"question: {'a text' if not is_batch else f'{len(rows)} texts'} for {mine}")
        return [
            self._template.message("user", checked_question(text), checked_images(shown), checked_videos(moving))
            for text, shown, moving in rows
        ]

    def _new_tokens(self, asked: list[Message]) -> NewTokens:
        if not self._rows:
            texts = [self._template.render([*self._system, message]) for message in asked]
        else:
            texts = [
                self._template.behind_answer([*row, message]) for row, message in zip(self._rows, asked, strict=True)
            ]
        return self._template.tokens(texts, asked, is_first=not self._rows)

    def _check_fits(self, new: NewTokens, answering: Answering) -> None:
        before, tokens = self._transcript.width, new.ids.shape[1]
        if before + tokens + answering.max_new_tokens > answering.max_length:
            raise ValueError(
                f"the turn does not fit: {before} tokens so far, {tokens} of the question and an answer of up to "
                f"{answering.max_new_tokens} are more than max_length={answering.max_length}"
            )

    def _take_turn(
        self,
        asked: list[Message],
        new: NewTokens,
        ending: Ending,
        answering: Answering,
        is_batch: bool,
        streamer: Any,
    ) -> list[str]:
        options = {"max_new_tokens": answering.max_new_tokens, **answering.options, "streamer": streamer}
        options.pop("stopping_criteria", None)
        found = self._transcript.answer(new, ending, options, answering.end_tokens(self._model))
        texts = [self._template.read(ids) for ids in found]
        rows = self._rows or [list(self._system) for _ in asked]
        self._rows = [
            [*row, message, self._template.message("assistant", text)]
            for row, message, text in zip(rows, asked, texts, strict=True)
        ]
        self._is_batch = is_batch
        return [text.strip() for text in texts]
