"""ShiftKV that counts values in other ways than the library does, to measure what each part of it is worth."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mmshiftkv import LayerInput, refit_values
from mmshiftkv.methods.columns import first_tokens
from mmshiftkv.methods.shiftkv import Proxies, ShiftKV
from shiftkv_kernels import vote
from shiftkv_kernels.reference.attention import attention_of, columns_of
from shiftkv_kernels.reference.values import LARGEST_MEAN, SINK_MASS

VOTES_OF_VALUES = 0.7  # share of what a group is given that its votes hold


class Observed(NamedTuple):
    """What ShiftKV needs of a prompt, and its last tokens."""

    summary: Any
    last_tokens: LayerInput


class Queries(NamedTuple):
    """The proxies, and the rotated queries of the last tokens, (B, H, n, D)."""

    proxies: Proxies
    last_tokens: torch.Tensor


@dataclass(frozen=True)
class VariedValues(ShiftKV):
    """ShiftKV with `score="values"` and one part of the score, or of the refit, replaced.

    It holds the attention of all proxies at once, (B, H, N, T): it is for the small embedded model, and for prompts in
    one piece.

    Attributes:
        weight: what a token's mass is weighted with: "distance" of its value from the mean output (the library's), the
            value's "length", the "projected" distance (behind the output projection, by query head), or "none".
        statistic: over the proxies: "rms" (the library's), "mean", "largest", or "votes" of groups.
        remaining: the mass that takes a token's place, by which its own is divided: "mean" over the proxies (the
            library's), that of each "query", or "none".
        in_groups: whether the mass is averaged over each group, the last query among them, and over query heads first.
        first_tokens: so many first tokens are always kept.
        last_tokens: values are refitted to the queries of so many last tokens, instead of to proxies; 0: to proxies.
    """

    weight: str = "distance"
    statistic: str = "rms"
    remaining: str = "mean"
    in_groups: bool = False
    first_tokens: int = 0
    last_tokens: int = 0

    @property
    def protected(self) -> int:
        """How many tokens are always kept."""
        return 1 + self.first_tokens

    def observe(self, layer: Any, inputs: LayerInput, earlier: Any) -> Any:
        """As ShiftKV, and the last tokens."""
        tokens = inputs.hidden_states.shape[1]
        last = inputs.tokens(max(tokens - max(self.last_tokens, 1), 0), tokens).copied()
        return Observed(super().observe(layer, inputs, None), last)

    def prepare(self, layer: Any, summary: Any, valid: torch.Tensor | None) -> Any:
        """The proxies, and the queries of the last tokens."""
        last = summary.last_tokens
        queries = layer.queries(last.hidden_states, last.positions)
        return Queries(super().prepare(layer, summary.summary, valid), queries)

    def score(
        self, layer: Any, summary: Any, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores (B, H_kv, T) float32, as `Method.score` says."""
        columns = columns_of(keys, layer.scaling, valid, softcap=layer.softcap, sinks=layer.sinks)
        proxies = summary.proxies
        mass, last_mass = (attention_of(part, columns) for part in (proxies.queries, proxies.last_query))
        mean = mass.mean(dim=(2, 3))
        proxies.has_sink = (mean > SINK_MASS).any(dim=-1)
        output = mean.unsqueeze(2) @ values.float()
        if self.in_groups:
            last_mass = last_mass.mean(dim=2, keepdim=True)
            groups = mass.mean(dim=2, keepdim=True).unflatten(3, (proxies.groups, -1))
            mass = (groups.sum(dim=4) + last_mass) / (1 + groups.shape[4])
        weight = self._weight(layer, values, output)
        given, last = (self._per_remaining(part) * weight for part in (mass, last_mass))
        scores = self._statistic(given, proxies.groups) + self.config.last_query_weight * self._last(last)
        if self.first_tokens:
            first = first_tokens(keys, valid, self.first_tokens)[:, None]
            scores = torch.where(first, 2 * scores.amax(dim=-1, keepdim=True) + 1, scores)
        return scores if valid is None else scores.masked_fill(~valid[:, None], 0)

    def refit(
        self,
        layer: Any,
        summary: Any,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """As ShiftKV, or to the queries of the last tokens."""
        if not self.last_tokens:
            return super().refit(layer, summary.proxies, keys, values, kept, valid)
        queries, ridge = summary.last_tokens, self.config.refit_ridge
        logits = {"scaling": layer.scaling, "softcap": layer.softcap, "sinks": layer.sinks}
        return refit_values(queries, keys, values, kept, ridge=ridge, valid=valid, **logits)

    def _weight(self, layer: Any, values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What mass (B, H_kv, r, n, T) is multiplied with."""
        if self.weight == "none":
            return torch.ones((), device=values.device)
        if self.weight == "projected":
            kv_heads, head_dim = values.shape[1], values.shape[3]
            by_head = layer.module.o_proj.weight.float().unflatten(1, (kv_heads, -1, head_dim))  # (d, H_kv, r, D)
            gram = torch.einsum("dkri,dkrj->krij", by_head, by_head)
            offset = values.float() - output
            squares = torch.einsum("bkti,krij,bktj->bkrt", offset, gram, offset)
            if self.in_groups:
                squares = squares.mean(dim=2, keepdim=True)
            return squares.clamp_min(0).sqrt().unsqueeze(3)
        offset = values.float() if self.weight == "length" else values.float() - output
        return torch.linalg.vector_norm(offset, dim=-1)[:, :, None, None]

    def _per_remaining(self, mass: torch.Tensor) -> torch.Tensor:
        if self.remaining == "none":
            return mass
        taken = mass if self.remaining == "query" else mass.mean(dim=(2, 3), keepdim=True)
        return mass / (1 - taken.clamp(max=LARGEST_MEAN))

    def _statistic(self, given: torch.Tensor, groups: int) -> torch.Tensor:
        if self.statistic == "mean":
            return given.mean(dim=(2, 3))
        if self.statistic == "largest":
            return given.amax(dim=(2, 3))
        if self.statistic == "rms":
            return given.square().mean(dim=(2, 3)).sqrt()
        by_group = given.mean(dim=2)
        if by_group.shape[2] != groups:
            by_group = by_group.unflatten(2, (groups, -1)).mean(dim=3)
        return vote(by_group.contiguous(), VOTES_OF_VALUES)

    def _last(self, given: torch.Tensor) -> torch.Tensor:
        scores = given.square().mean(dim=(2, 3)).sqrt()
        return scores / scores.sum(dim=-1, keepdim=True) if self.statistic == "votes" else scores
