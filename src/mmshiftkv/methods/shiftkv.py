"""MM-ShiftKV: query proxies, and what a prompt's tokens give to them."""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from shiftkv_kernels import attend, draw_samples, group_mass, refit_values, token_statistics, value_scores, vote
from shiftkv_kernels.reference.values import SINK_MASS
from shiftkv_kernels.replaying import Replays, Tensors

from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer, QueriesAhead
from .base import Method, Read
from .config import ShiftKVConfig

LAST_TOKEN_PROXIES = 16
# Of the conjugate gradients; on the embedded model two steps, not even scaled, read as much as the solution.
REFIT_STEPS = 2
# Statistics of prompts depend on nothing but the hidden states: those of all models and layers are repeated.
_repeats = Replays()


def _logits_of(layer: AttentionLayer) -> dict[str, Any]:
    """How the layer makes logits of products, as keywords of the operations."""
    return {"scaling": layer.scaling, "softcap": layer.softcap, "sinks": layer.sinks}


@dataclass(frozen=True)
class PromptSummary:
    """What ShiftKV needs of a prompt besides its keys: (B, T) token statistics, and the last token's state."""

    token_means: torch.Tensor
    token_squares: torch.Tensor
    last: LayerInput


@dataclass
class Proxies:
    """The queries that score the prompt of one layer (method, steps 1 to 3).

    Attributes:
        ahead: the queries; those of one group are neighbours.
        groups: how many groups there are.
        has_sink: (B, H_kv) bool, which KV heads have an attention sink; known once the prompt has been scored.
    """

    ahead: QueriesAhead
    groups: int
    has_sink: torch.Tensor | None = None

    @property
    def queries(self) -> torch.Tensor:
        """(B, H, N, D), rotated."""
        return self._rotated[0]

    @property
    def last_query(self) -> torch.Tensor:
        """(B, H, 1, D), the rotated query of the last prompt token."""
        return self._rotated[1]

    @cached_property
    def _rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ahead.rotated()


@dataclass(frozen=True)
class ShiftKV(Method):
    """MM-ShiftKV (Findings of ACL 2026): scores by the attention of variance-expanded query proxies.

    As published, groups of proxies vote for the tokens that they attend to.  With `score="values"` a token counts by
    what it gives to the proxies' outputs, and the kept values can be refitted (method, steps 7 to 9).

    Attributes:
        config: the settings; what concerns budget and storage is not looked at.
    """

    config: ShiftKVConfig

    def observe(self, layer: AttentionLayer, inputs: LayerInput, earlier: PromptSummary | None) -> PromptSummary:
        """Token statistics of all tokens so far, and a copy of the last token's state."""
        states = inputs.hidden_states
        statistics = partial(self._statistics, states)
        on_gpu = states.device.type == "cuda"
        means, squares, state = _repeats.run(statistics, (states,), self.config.backend) if on_gpu else statistics()
        assert means is not None
        assert squares is not None
        assert state is not None
        if earlier is not None:
            means = torch.cat([earlier.token_means, means], dim=1)
            squares = torch.cat([earlier.token_squares, squares], dim=1)
        return PromptSummary(means, squares, inputs.last_with(state))

    def _statistics(self, hidden_states: torch.Tensor) -> Tensors:
        # A view of the last token's state would keep all of them alive.
        last = hidden_states.new_empty((hidden_states.shape[0], 1, hidden_states.shape[2]))
        return *token_statistics(hidden_states, last=last, backend=self.config.backend), last

    def prepare(self, layer: AttentionLayer, summary: PromptSummary, valid: torch.Tensor | None) -> Proxies:
        """Rotated proxies and last query (method, steps 1 to 3)."""
        last = summary.last
        if self._is_of_last_token(layer):
            hidden_states = last.hidden_states.expand(-1, LAST_TOKEN_PROXIES + 1, -1)
        else:
            hidden_states = self._samples(layer.index, summary, valid)
        groups, places = self._groups_and_places(layer)
        ahead = layer.queries_ahead(hidden_states, last.positions, **places, backend=self.config.backend)
        return Proxies(ahead, groups)

    def read(self, layer: AttentionLayer, summary: PromptSummary | Proxies) -> Read | None:
        """Of a prompt its statistics, the last token's state and what makes queries of them; else the queries."""
        if isinstance(summary, Proxies):
            return Read((summary.ahead.states, *summary.ahead.factors), summary.groups)
        if self._is_of_last_token(layer):
            return None
        ahead = layer.read_ahead(summary.last.positions, **self._groups_and_places(layer)[1])
        if ahead is None:
            return None
        states = (summary.token_means, summary.token_squares, summary.last.hidden_states)
        numbers = {"gamma": self.config.gamma_of(layer.index), "stream": layer.index}
        return Read((*states, *ahead[0]), ahead[1], numbers)

    def _is_of_last_token(self, layer: AttentionLayer) -> bool:
        """Whether the layer's proxies are the last token's state at later positions."""
        return layer.index < self.config.last_token_layers

    def _groups_and_places(self, layer: AttentionLayer) -> tuple[int, dict[str, int]]:
        """How many groups of proxies, and at how many later positions they are and how far these are apart."""
        config = self.config
        if self._is_of_last_token(layer):
            return 1, {"count": LAST_TOKEN_PROXIES, "stride": 1}
        groups = config.num_groups
        return groups, {"count": config.num_proxies // groups, "stride": config.future_stride or groups}

    def score(
        self,
        layer: AttentionLayer,
        summary: Proxies,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """Votes plus the last query's mass (method, steps 4 to 6), or what tokens give (steps 7 and 8)."""
        if self.config.score == "votes":
            mass, last_mass = self.attention_mass(layer, summary, keys, valid)
            if self.config.refit_queries:
                summary.has_sink = (mass.mean(dim=2) > SINK_MASS).any(dim=-1)
            return vote(mass, self.config.mass, last_mass, backend=self.config.backend)
        if self.config.refit_queries:
            summary.has_sink = keys.new_empty(keys.shape[:2], dtype=torch.bool)
        return value_scores(
            summary.queries.to(keys.dtype),
            summary.last_query.to(keys.dtype),
            keys,
            values.to(keys.dtype),  # as under autocast, where rotation makes keys of another dtype
            **_logits_of(layer),
            last_weight=self.config.last_query_weight,
            valid=valid,
            has_sink=summary.has_sink,
            backend=self.config.backend,
        )

    def attention_mass(
        self, layer: AttentionLayer, summary: Proxies, keys: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mass of each group and of the last query, as `group_mass` gives them (method, step 4)."""
        # Under autocast the model's own projections have another dtype than its keys.
        return group_mass(
            summary.queries.to(keys.dtype),
            summary.last_query.to(keys.dtype),
            keys,
            num_groups=summary.groups,
            **_logits_of(layer),
            valid=valid,
            backend=self.config.backend,
        )

    def refit(
        self,
        layer: AttentionLayer,
        summary: Proxies,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Values with which the kept tokens give proxies what the prompt gave them (method, step 9).

        KV heads with an attention sink keep the values as they are: the sink's would take on what is missing, and
        queries that attend to it more than the proxies do would get more than was ever missing.
        """
        config = self.config
        if not config.refit_queries:
            return None
        heads_each = summary.queries.shape[1] // keys.shape[1]
        # A power of two fills the kernels' tiles.
        count = 1 << (math.ceil(config.refit_queries / heads_each) - 1).bit_length()
        queries = summary.queries[:, :, :count].to(keys.dtype)
        given = values.to(keys.dtype)
        outputs = attend(queries, keys, given, **_logits_of(layer), valid=valid, backend=config.backend)
        assert summary.has_sink is not None
        refitted = refit_values(
            queries,
            outputs,
            keys,
            given,
            kept,
            **_logits_of(layer),
            ridge=config.refit_ridge,
            steps=REFIT_STEPS,
            valid=valid,
            unchanged=summary.has_sink,
            backend=config.backend,
        )
        return refitted.to(values.dtype)

    def _samples(self, index: int, summary: PromptSummary, valid: torch.Tensor | None) -> torch.Tensor:
        """(B, N + 1, d): the samples, and behind them the last token's state."""
        config = self.config
        last = summary.last.hidden_states
        return draw_samples(
            summary.token_means,
            summary.token_squares,
            count=config.num_proxies,
            features=last.shape[-1],
            gamma=config.gamma_of(index),
            seed=config.seed,
            stream=index,
            dtype=last.dtype,
            valid=valid,
            window=config.stats_window,
            last=last,
            backend=config.backend,
        )
