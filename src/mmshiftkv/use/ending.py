"""Where answers end: at stop strings, at an end token, or because somebody does not want to hear more."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import StopStringCriteria

_NEVER = torch.iinfo(torch.int64).max


class Ending(StoppingCriteria):
    """Ends rows at stop strings, at criteria of one's own and when asked to, and knows afterwards where they ended.

    Args:
        tokenizer: the processor's.
        stop: an answer ends behind any of these texts.
        criteria: more that ends answers.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], criteria: Iterable[StoppingCriteria] = ()) -> None:
        own = [StopStringCriteria(tokenizer, list(stop))] if stop else []
        self._criteria = StoppingCriteriaList([*own, *criteria])
        self._is_cancelled = threading.Event()
        self._widths: torch.Tensor | None = None

    def cancel(self) -> None:
        """Ends all rows with the next token."""
        self._is_cancelled.set()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        """Which rows have ended, (B,) bool."""
        rows, width = input_ids.shape
        if self._is_cancelled.is_set():
            done = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        elif self._criteria:
            done = self._criteria(input_ids, scores, **kwargs)
        else:
            done = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        if self._widths is None:
            self._widths = torch.full((rows,), _NEVER, device=input_ids.device)
        self._widths = torch.where(done, self._widths.clamp_max(width), self._widths)
        return done

    def mask(self, sequences: torch.Tensor, start: int, end_tokens: Sequence[int]) -> torch.Tensor:
        """Which columns from `start` on are the answers of sequences (B, T): (B, T - start) int64, 1 where they are.

        An end token is no part of an answer: the template writes it.
        """
        new = sequences[:, start:]
        columns = torch.arange(start, sequences.shape[1], device=new.device)
        ends = torch.isin(new, torch.tensor(list(end_tokens), dtype=new.dtype, device=new.device))
        shown = ends.int().cumsum(-1) == 0
        if self._widths is not None:
            shown = shown & (columns < self._widths[:, None].to(new.device))
        return shown.long()
