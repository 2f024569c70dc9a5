"""An answer piece by piece, while it is being made."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from transformers import TextIteratorStreamer

from ..model.parallel import Rank
from .ending import Ending


class AnswerStream(Iterator[str]):
    """Gives the pieces of an answer as they come; the turn runs whether they are read or not.

    `close()` ends the answer with the next token; what was said until then stays in the conversation.

    Args:
        start: begins the turn, with the streamer that it is to write to.
        tokenizer: the processor's.
        ending: of the turn.
        rank: of this process, if several share the model.
    """

    def __init__(
        self, start: Callable[[Any], "Future[Any]"], tokenizer: Any, ending: Ending, rank: Rank | None = None
    ) -> None:
        self._rank = rank
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ending = ending
        self._turn = start(self._streamer)
        # A turn that fails never comes to the streamer's end.
        self._turn.add_done_callback(lambda turn: self._streamer.text_queue.put(self._streamer.stop_signal))

    def __next__(self) -> str:
        try:
            return next(self._streamer)
        except StopIteration:
            self._streamer.text_queue.put(self._streamer.stop_signal)  # for who asks once more
            self._turn.result()
            raise

    def close(self) -> None:
        """Ends the answer, and waits until it has ended.

        Raises:
            RuntimeError: several processes share the model, and the answer has not ended: each would end at another
                token, and wait for the others for ever.
        """
        if self._rank is not None and not self._turn.done():
            raise RuntimeError(
                f"close: {self._rank} cannot end an answer early, as the other processes would wait for it; read the "
                "stream to its end"
            )
        self._ending.cancel()
        self._turn.result()
