"""MM-ShiftKV: the attention of query proxies as a score for each token of a prompt."""

from dataclasses import dataclass, replace

import torch

from shiftkv_kernels import draw_samples, group_mass, token_statistics, vote

from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer
from .base import Method
from .config import ShiftKVConfig

LAST_TOKEN_PROXIES = 16


@dataclass(frozen=True)
class PromptSummary:
    """What ShiftKV needs of a prompt besides its keys: (B, T) token statistics, and the last token's state."""

    token_means: torch.Tensor
    token_squares: torch.Tensor
    last: LayerInput


@dataclass(frozen=True)
class ShiftKV(Method):
    """MM-ShiftKV (Findings of ACL 2026): votes by the attention of variance-expanded query proxies.

    Attributes:
        config: the settings; what concerns budget and storage is not looked at.
    """

    config: ShiftKVConfig

    def observe(self, layer: AttentionLayer, inputs: LayerInput, earlier: PromptSummary | None) -> PromptSummary:
        """Token statistics of all tokens so far, and a copy of the last token's state."""
        means, squares = token_statistics(inputs.hidden_states, backend=self.config.backend)
        if earlier is not None:
            means = torch.cat([earlier.token_means, means], dim=1)
            squares = torch.cat([earlier.token_squares, squares], dim=1)
        tokens = inputs.hidden_states.shape[1]
        last = inputs.tokens(tokens - 1, tokens)
        # Only the hidden states are this layer's own: a view would keep all of them alive.
        return PromptSummary(means, squares, replace(last, hidden_states=last.hidden_states.clone()))

    def score(
        self,
        layer: AttentionLayer,
        summary: PromptSummary,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """Votes plus the last query's attention mass (method, step 6)."""
        mass, last_mass = self.attention_mass(layer, summary, keys, valid)
        return vote(mass, self.config.mass, backend=self.config.backend) + last_mass

    def attention_mass(
        self, layer: AttentionLayer, summary: PromptSummary, keys: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mass of each group and of the last query, as `group_mass` gives them (method, steps 1 to 4)."""
        proxies, last_query, num_groups = self.queries(layer, summary, valid)
        # Under autocast the model's own projections have another dtype than its keys.
        return group_mass(
            proxies.to(keys.dtype),
            last_query.to(keys.dtype),
            keys,
            num_groups=num_groups,
            scaling=layer.scaling,
            valid=valid,
            backend=self.config.backend,
        )

    def queries(
        self, layer: AttentionLayer, summary: PromptSummary, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Rotated proxies (B, H, N, D) and last query (B, H, 1, D), and the number of groups (method, steps 1 to 3)."""
        config = self.config
        last = summary.last
        if layer.index < config.last_token_layers:
            num_groups, stride = 1, 1
            hidden_states = last.hidden_states.expand(-1, LAST_TOKEN_PROXIES, -1)
        else:
            num_groups, stride = config.num_groups, config.future_stride or config.num_groups
            hidden_states = self._samples(layer.index, summary, valid)
        # One projection makes the proxies and the last token's own query.
        queries = layer.project_queries(torch.cat([hidden_states, last.hidden_states], dim=1))
        count = hidden_states.shape[1] // num_groups
        proxies, last_query = layer.rotate_ahead(
            queries[:, :, :-1],
            queries[:, :, -1:],
            last.cos,
            last.sin,
            count=count,
            stride=stride,
            backend=config.backend,
        )
        return proxies, last_query, num_groups

    def _samples(self, index: int, summary: PromptSummary, valid: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        hidden_states = summary.last.hidden_states
        return draw_samples(
            summary.token_means,
            summary.token_squares,
            count=config.num_proxies,
            features=hidden_states.shape[-1],
            gamma=config.gamma_of(index),
            seed=config.seed,
            stream=index,
            dtype=hidden_states.dtype,
            valid=valid,
            window=config.stats_window,
            backend=config.backend,
        )
