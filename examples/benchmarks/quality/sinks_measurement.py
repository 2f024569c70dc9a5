"""Finds each layer's most attended prompt token while a model decodes."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.quality.questions import question_batches
from benchmarks.quality.recall import decode_attention, decoding_steps
from tiny_vlm.answering import MAX_NEW_TOKENS, answer_tokens


@dataclass
class MostAttended:
    """Of one layer, the most attended token of each prompt: its share of the attention (0..1), and what it is."""

    shares: list[float] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)

    @property
    def mean(self) -> float:
        """The mean share over the prompts."""
        return sum(self.shares) / len(self.shares)

    @property
    def usual(self) -> tuple[str, float]:
        """The token that it is most often, and in which share of the prompts."""
        ((token, times),) = self.tokens.most_common(1)
        return token, times / len(self.shares)


def most_attended(
    attention: Sequence[torch.Tensor], heads: int, steps: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The most attended token of each prompt.

    Args:
        attention: of each layer (B, H_kv, T), as `recall.decode_attention` gives it.
        heads: query heads of a layer.
        steps: decoding steps of each prompt, (B,), at least 1.

    Returns:
        Of each layer its share of the attention of a query, in 0..1, and its column, both (B,).
    """
    found = []
    for mass in attention:
        share, column = (mass.sum(dim=1) / (heads * steps[:, None])).max(dim=1)
        found.append((share, column))
    return found


def measure(model: Any, processor: Any, arguments: argparse.Namespace) -> list[MostAttended]:
    """Answers the questions with the full cache; prompts whose answer has no decoding step do not count."""
    text = model.config.get_text_config()
    layers = [MostAttended() for _ in range(text.num_hidden_layers)]
    for task in arguments.tasks:
        for inputs, _ in question_batches(model, processor, task, arguments):
            cache = DynamicCache(config=text)
            answers = answer_tokens(model, inputs, cache, MAX_NEW_TOKENS[task])
            steps = decoding_steps(model, answers).sum(dim=1)
            attention = decode_attention(model, inputs, answers, cache)
            for layer, (shares, columns) in zip(
                layers, most_attended(attention, text.num_attention_heads, steps.clamp(min=1)), strict=True
            ):
                for row in steps.nonzero().flatten().tolist():
                    layer.shares.append(shares[row].item())
                    first = int(inputs["attention_mask"][row].argmax())
                    layer.tokens[name_of(processor, inputs["input_ids"][row], int(columns[row]), first)] += 1
    return layers


def name_of(processor: Any, ids: torch.Tensor, column: int, first: int) -> str:
    """What to call a token of a prompt (T,) whose padding ends before `first`; visual tokens have one name."""
    place = "first" if column == first else "last" if column == len(ids) - 1 else f"{len(ids) - column} from the end"
    token: str = processor.tokenizer.convert_ids_to_tokens(int(ids[column]))
    return token if token == processor.image_token else f"{token} ({place})"
