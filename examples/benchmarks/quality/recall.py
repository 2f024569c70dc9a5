"""Decode attention recall: how much of what a model attends to while it decodes is among the tokens a cache keeps.

The full cache's own answer is decoded once more with the full cache, and the attention of its steps to the prompt is
summed. A cache's recall is the share of this sum that lies on the tokens which it keeps, layer by layer. It needs no
right answer, and says where a method loses what: a recall of 1 means that nothing the answer looked at is gone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from mmshiftkv import CACHE_ARGUMENT, PrefillSelectionCache

STEPS_AT_ONCE = 32  # bounds the attention weights: layers x (batch, heads, so many, tokens)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """The attention that gives its weights, for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def decoding_steps(model: Any, answers: torch.Tensor) -> torch.Tensor:
    """Which of the tokens that `generate` gave were decoded from: (B, n) bool.

    Those before the end of each answer; the token that ends it, and the last one, have no step of their own.
    """
    ids = model.generation_config.eos_token_id
    ends = torch.tensor([] if ids is None else ids, dtype=answers.dtype, device=answers.device).view(-1)
    steps = torch.isin(answers, ends).cumsum(dim=1) == 0
    steps[:, -1] = False
    return steps


@torch.no_grad()
def decode_attention(model: Any, inputs: Any, answers: torch.Tensor, cache: DynamicCache) -> list[torch.Tensor]:
    """The attention of all decoding steps to the prompt, summed over the steps and each KV head's query heads.

    Args:
        model: the model, which has just answered with this cache: Qwen-VL models keep the last prompt's positions.
        inputs: the prompts, (B, T), padded on the left.
        answers: what `generate` added, (B, n) ids.
        cache: the full cache that it was given; its answer tokens are stored anew.

    Returns:
        For each layer (B, H_kv, T) float32.
    """
    prompts, mask = inputs["input_ids"].to(answers.device), inputs["attention_mask"].to(answers.device)
    rows, tokens = prompts.shape
    steps = decoding_steps(model, answers)
    answered = cache.get_seq_length() - tokens
    if answered:
        cache.crop(-answered)
    heads = [layer.keys.shape[1] for layer in cache.layers]
    total = [torch.zeros(rows, count, tokens, device=answers.device) for count in heads]
    with eager_attention(model):
        for start in range(0, answers.shape[1] - 1, STEPS_AT_ONCE):
            stop = min(start + STEPS_AT_ONCE, answers.shape[1] - 1)
            # As the next turn of a conversation: `generate` knows the positions of its tokens, for every model.
            output = model.generate(
                torch.cat([prompts, answers[:, :stop]], dim=1),
                attention_mask=torch.cat([mask, torch.ones_like(answers[:, :stop])], dim=1),
                **{CACHE_ARGUMENT: cache},
                max_new_tokens=1,
                do_sample=False,
                output_attentions=True,
                return_dict_in_generate=True,
            )
            for mass, attention in zip(total, output.attentions[0], strict=True):
                by_step = steps[:, None, start:stop, None] * attention[..., :tokens].float()
                mass += by_step.sum(dim=2).unflatten(1, (mass.shape[1], -1)).sum(dim=2)
    return total


def recall(attention: list[torch.Tensor], cache: Any) -> torch.Tensor:
    """The share of the attention to the prompt that lies on what a cache keeps of it.

    Args:
        attention: as `decode_attention` gives it.
        cache: one that has answered the same prompts; all that are no `PrefillSelectionCache` keep everything.

    Returns:
        (B, layers) in 0..1; NaN for a row without decoding steps.
    """
    shares = []
    for layer, mass in enumerate(attention):
        kept = cache.kept_indices(layer) if isinstance(cache, PrefillSelectionCache) else None
        on_kept = mass if kept is None else mass.gather(2, kept)
        shares.append(on_kept.sum(dim=(1, 2)) / mass.sum(dim=(1, 2)))
    return torch.stack(shares, dim=1)
