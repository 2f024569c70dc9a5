"""Greedy generation, and how two of them compare."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mmshiftkv import CACHE_ARGUMENT

NEW_TOKENS = 8
# float32: the same sums over fewer or more terms, in another order, through some layers.
TOLERANCE = 5e-4


@dataclass(frozen=True)
class Answer:
    """What came of a prompt: token ids (B, t) and logits (B, t, vocabulary)."""

    tokens: torch.Tensor
    logits: torch.Tensor


def answer(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any) -> Answer:
    """Greedily generates NEW_TOKENS."""
    output = model.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Answer(output.sequences[:, -NEW_TOKENS:], torch.stack(output.logits, dim=1))


def difference(mine: Answer, theirs: Answer) -> str | None:
    """How two answers differ; None if they are bit-identical."""
    if mine.tokens.equal(theirs.tokens) and mine.logits.equal(theirs.logits):
        return None
    largest = (mine.logits - theirs.logits).abs().max().item()
    return f"logits differ by {largest:.1e}" + ("" if mine.tokens.equal(theirs.tokens) else ", and tokens")


def is_close(mine: Answer, theirs: Answer) -> bool:
    """Whether they are the same but for rounding."""
    return mine.tokens.equal(theirs.tokens) and torch.allclose(
        mine.logits, theirs.logits, rtol=TOLERANCE, atol=TOLERANCE
    )
