"""Prompts for the tiny models."""

from dataclasses import dataclass
from typing import Any

import torch

from .shrink import FIRST_TEXT_TOKEN, VOCABULARY

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """Two prompts of different lengths.

    Attributes:
        first, second: what `generate` takes, of one row each.
        batch: both together, padded on the left.
    """

    first: Inputs
    second: Inputs
    batch: Inputs

    @property
    def columns(self) -> int:
        """Of the first prompt."""
        return self.first["input_ids"].shape[1]


def text_prompts() -> Prompts:
    """Random text."""
    rows = [_text(40, seed=0), _text(27, seed=1)]
    return Prompts(*rows, batch=_left_padded(rows))


def _text(tokens: int, *, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_TEXT_TOKEN, VOCABULARY, (1, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _left_padded(rows: list[Inputs]) -> Inputs:
    width = max(row["input_ids"].shape[1] for row in rows)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for index, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        ids[index, width - length :] = row["input_ids"][0]
        mask[index, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}
