"""Expected Attention as a method."""

import math
from dataclasses import dataclass

import torch

from ..checks import check_integer, check_real
from ..model.hooks import LayerInput
from ..model.positions import Positions, map_factors
from ..model.queries import AttentionLayer
from .base import Method
from .columns import first_tokens

_TOKENS_AT_ONCE = 2048  # bounds the float32 copy of the queries


@dataclass(frozen=True)
class QueryStatistics:
    """Of the queries seen so far, before rotation: what the statistics of more of them can be made of.

    Attributes:
        seen: (B, 1) int64, tokens without padding.
        count: (B, 1, 1, 1) float32, tokens that the statistics are of: those behind the sinks.
        mean: (B, H, 1, D) float32.
        scatter: (B, H, D, D) float32, summed outer products of the deviations from the mean.
        last: position of the last token.
    """

    seen: torch.Tensor
    count: torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor
    last: Positions


@dataclass(frozen=True)
class ExpectedAttention(Method):
    """Expected Attention (Devoto et al., 2025, https://arxiv.org/abs/2510.00636): the attention of likely queries.

    Future queries are taken for Gaussian, with mean and covariance of the prompt's queries before rotation, rotated to
    the mean of the next positions.  A token's expected attention, exp(mean . k + k . covariance . k / 2) normalized
    over the tokens and averaged over the query heads of a KV head, is weighted with the length of its value.

    As in kvpress the sinks are kept, and neither they nor their queries are looked at otherwise, and the length is that
    of the value (paper: after the output projection).  Unlike there all is done with logarithms: expected attention
    that would underflow to equal zeros still has an order.

    Where a model caps its logits there is no such closed form: they are taken uncapped, and tokens with high ones count
    for more than in the model.  A learned sink takes a share of a query head's attention, so that the head counts for
    less among those that share a KV head; the order of a head's tokens stays.

    Attributes:
        future_positions: positions that the rotation is averaged over (kvpress: 512).
        sinks: first tokens that are kept (kvpress: 4).
        epsilon: added to the expected attention before it is weighted (kvpress: 0).

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    future_positions: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_integer("future_positions", self.future_positions, minimum=1)
        check_integer("sinks", self.sinks, minimum=0)
        check_real("epsilon", self.epsilon, lambda value: 0 <= value < math.inf, "a finite number >= 0")

    @property
    def protected(self) -> int:
        """How many tokens are always kept: the sinks and the last."""
        return self.sinks + 1

    def check(self, layer: AttentionLayer) -> None:
        """Raises ValueError if it is not known how the layer's queries are rotated."""
        if not layer.can_rotate:
            raise ValueError(
                f"model: layer {layer.index} ({type(layer.module).__name__}): ExpectedAttention needs to know how "
                "queries are rotated, and this is none of the known ways"
            )

    def observe(self, layer: AttentionLayer, inputs: LayerInput, earlier: QueryStatistics | None) -> QueryStatistics:
        """Statistics of the queries so far."""
        tokens = inputs.hidden_states.shape[1]
        summary = earlier
        for start in range(0, tokens, _TOKENS_AT_ONCE):
            summary = self._added(layer, inputs.tokens(start, start + _TOKENS_AT_ONCE), summary)
        assert summary is not None
        return summary

    def _added(self, layer: AttentionLayer, inputs: LayerInput, earlier: QueryStatistics | None) -> QueryStatistics:
        queries = layer.unrotated(inputs.hidden_states, inputs.positions).float()
        valid = inputs.valid
        if valid is None:
            valid = torch.ones(queries.shape[0], queries.shape[2], dtype=torch.bool, device=queries.device)
        before = 0 if earlier is None else earlier.seen
        # Padding comes first, so nothing of it lies behind the sinks.
        counted = (before + valid.cumsum(dim=1) > self.sinks)[:, None, :, None].float()
        count = counted.sum(dim=2, keepdim=True)
        mean = (queries * counted).sum(dim=2, keepdim=True) / count.clamp_min(1)
        deviations = (queries - mean) * counted
        scatter = deviations.transpose(-1, -2) @ deviations
        if earlier is not None:
            total = count + earlier.count
            step = mean - earlier.mean
            share = count / total.clamp_min(1)
            scatter = earlier.scatter + scatter + step.transpose(-1, -2) @ step * (earlier.count * share)
            mean, count = earlier.mean + step * share, total
        seen = before + valid.sum(dim=1, keepdim=True)
        return QueryStatistics(seen, count, mean, scatter, inputs.positions.last.copied())

    def score(
        self,
        layer: AttentionLayer,
        summary: QueryStatistics,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """The logarithm of the weighted attention above the lowest one, and the sinks above all."""
        sinks = first_tokens(keys, valid, self.sinks)[:, None]
        ignored = sinks if valid is None else sinks | ~valid[:, None]
        attention = self._log_attention(layer, summary, keys.float(), ignored)
        if self.epsilon:
            attention = torch.logaddexp(attention, torch.full_like(attention, math.log(self.epsilon)))
        scores = attention + torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32).log()
        finite = scores.isfinite() & ~ignored
        lowest = scores.masked_fill(~finite, torch.inf).amin(dim=-1, keepdim=True)
        scores = torch.where(finite, scores - lowest, 0)
        return torch.where(sinks, 2 * scores.amax(dim=-1, keepdim=True) + 1, scores)

    def _log_attention(
        self, layer: AttentionLayer, summary: QueryStatistics, keys: torch.Tensor, ignored: torch.Tensor
    ) -> torch.Tensor:
        """Logarithm of the expected attention, (B, H_kv, T), one query head of each KV head at a time."""
        last = summary.last.with_factors(map_factors(_wide, summary.last.factors))
        later = layer.rotary.ahead(last, count=self.future_positions, stride=1).factors
        # A rotation is linear in its factors, so theirs is the mean rotation.
        mean_factors = map_factors(lambda factor: factor.mean(dim=1, keepdim=True), later)

        def rotated(states: torch.Tensor) -> torch.Tensor:
            return layer.rotate(
                states, map_factors(lambda factor: factor.expand(-1, states.shape[2], -1), mean_factors)
            )

        mean = rotated(summary.mean) * layer.scaling
        covariance = summary.scatter / summary.count.clamp_min(1) * layer.scaling**2
        covariance = rotated(rotated(covariance).transpose(-1, -2))  # symmetric, so from both sides
        heads_each = mean.shape[1] // keys.shape[1]
        total: torch.Tensor | None = None
        for head in range(heads_each):
            head_mean, head_covariance = mean[:, head::heads_each], covariance[:, head::heads_each]
            logits = (keys * (head_mean + keys @ head_covariance / 2)).sum(dim=-1).masked_fill(ignored, -torch.inf)
            logs = logits.log_softmax(dim=-1)
            if layer.sinks is not None:
                sums = logits.logsumexp(dim=-1, keepdim=True)
                # The share of the attention that the head's sink leaves to tokens.
                logs = logs + torch.nn.functional.logsigmoid(sums - layer.sinks.float()[head::heads_each, None])
            total = logs if total is None else torch.logaddexp(total, logs)
        assert total is not None
        return total - math.log(heads_each)


def _wide(factor: torch.Tensor) -> torch.Tensor:
    return factor if factor.is_complex() else factor.float()
