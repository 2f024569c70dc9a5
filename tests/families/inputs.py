"""Prompts for the tiny models."""

import torch

from .shrink import FIRST_TEXT_TOKEN, VOCABULARY

PROMPT_TOKENS = 40


def prompt(rows: int = 1, tokens: int = PROMPT_TOKENS, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random text: input_ids and attention_mask (rows, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_TEXT_TOKEN, VOCABULARY, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def left_padded(rows: list[dict[str, torch.Tensor]], padding: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of one row each in one batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    ids, mask = (torch.full((len(rows), width), value) for value in (padding, 0))
    for index, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        ids[index, width - length :] = row["input_ids"][0]
        mask[index, width - length :] = row["attention_mask"][0]
    return {"input_ids": ids, "attention_mask": mask}
