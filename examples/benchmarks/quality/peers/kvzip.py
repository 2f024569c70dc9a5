"""KVzip, the attention that repeating the prompt pays to it, as a method."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.quality.peers.given_scores import GivenScores
from benchmarks.quality.recall import STEPS_AT_ONCE, eager_attention
from mmshiftkv import CACHE_ARGUMENT
from mmshiftkv.checks import check_integer
from mmshiftkv.methods.columns import first_tokens
from mmshiftkv.model.decoder import text_decoder

INSTRUCTION = "\n\nRepeat the previous context exactly."  # of kvpress


@dataclass(frozen=True, eq=False)
class KVzip(GivenScores):
    """KVzip (Kim et al., NeurIPS 2025, https://arxiv.org/abs/2505.23416): what repeating the prompt looks at.

    A second pass has the model read an instruction to repeat the prompt, and the prompt once more.  A token's score is
    the highest attention that any of these queries and any query head of its KV head pays to it.  The second pass has
    the cost of the method: the authors name prefilling twice as long (https://janghyun1230.github.io/kvzip), kvpress
    two to three times the prefill on top of it.

    Settings and conventions are those of kvpress 0.5.5 (`KVzipPress`), without its normalization "KVzip+".  These
    differ: every KV head keeps as many tokens as the others, as in all of this comparison; kvpress and the authors
    share the budget between the heads, and by default between the layers.  The whole prompt is repeated, its question
    and chat template included, and not only the context before the question.  It is repeated in one piece, with the
    attention to all of the prompt, where kvpress has pieces of 2048 tokens.

    Attributes:
        sinks: first tokens that are kept (kvpress: 4).
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        check_integer("sinks", self.sinks, minimum=0)

    @property
    def protected(self) -> int:
        """How many tokens are always kept: the sinks and the last."""
        return self.sinks + 1

    def score(
        self, layer: Any, summary: None, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores (B, H_kv, T) float32, as `Method.score` says: at most 1, and the sinks above them."""
        scores = super().score(layer, summary, keys, values, valid)
        return scores.masked_fill(first_tokens(keys, valid, self.sinks)[:, None], 2)


@torch.no_grad()
def repeated_attention(model: Any, inputs: Any, instruction: torch.Tensor) -> list[torch.Tensor]:
    """The highest attention that the repeated prompts pay to each token of the prompts (paper, section 3).

    The second pass goes in pieces, so that no attention of all its tokens is held at once.

    Args:
        model: the model.
        inputs: the prompts, (B, T), padded on the left, with what the model needs besides.
        instruction: ids (k,) that come between a prompt and its repetition.

    Returns:
        For each layer (B, H_kv, T) float32 in 0..1, 0 for padding.
    """
    cache = DynamicCache(config=model.config)
    states, positions = _decoder_inputs(model, inputs, cache)
    rows, tokens = states.shape[:2]
    valid = inputs["attention_mask"].to(states.device)
    told = model.get_input_embeddings()(instruction.to(states.device)).expand(rows, -1, -1)
    after = positions[..., -1:] + 1 + torch.arange(len(instruction), device=positions.device)
    states = torch.cat([told, states], dim=1)
    positions = torch.cat([after, positions + after[..., -1:] + 1], dim=-1)
    # Padding stands before each repetition too: it is masked, and its positions do not matter.
    mask = torch.cat([valid, valid.new_ones(told.shape[:2]), valid], dim=1)
    highest = [torch.zeros(rows, layer.keys.shape[1], tokens, device=states.device) for layer in cache.layers]
    with eager_attention(model):
        for start in range(0, states.shape[1], STEPS_AT_ONCE):
            piece = slice(start, start + STEPS_AT_ONCE)
            seen = tokens + states[:, piece].shape[1] + start
            output = text_decoder(model)(
                inputs_embeds=states[:, piece],
                position_ids=positions[..., piece],
                attention_mask=mask[:, :seen],
                **{CACHE_ARGUMENT: cache},
                use_cache=True,
                output_attentions=True,
            )
            asked = mask[:, None, tokens + start : seen, None]
            for score, attention in zip(highest, output.attentions, strict=True):
                best = (attention[..., :tokens].float() * asked).amax(dim=2)
                torch.maximum(score, best.unflatten(1, (score.shape[1], -1)).amax(dim=2), out=score)
    return highest


def _decoder_inputs(model: Any, inputs: Any, cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefills the cache with prompts, and returns what the text decoder got of them.

    Returns:
        Embeddings (B, T, d), those of images among them, and positions (B or 1, T), before them one dimension more if
        the model's positions have several axes.
    """
    seen: dict[str, Any] = {}
    decoder: Any = text_decoder(model)
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=1, do_sample=False)
    finally:
        hook.remove()
    states = seen.get("inputs_embeds")
    if states is None:
        states = model.get_input_embeddings()(seen["input_ids"])
    return states, seen["position_ids"]
