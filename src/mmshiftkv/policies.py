"""Policies: from what a layer saw of a prompt to a score for each of its tokens."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from shiftkv_kernels import group_mass, vote

from .attention import AttentionLayer
from .config import ShiftKVConfig
from .observation import Observation
from .proxies import expanded_samples, future_queries, gaussian_noise, prompt_statistics, token_statistics

LAST_TOKEN_PROXIES = 16


class Policy(Protocol):
    """What a selecting cache asks of a policy.

    A prompt is shown to `observe` in one piece or, when it is prefilled in chunks, in several; `score` then gets what
    the last call returned.  A policy keeps nothing of a prompt in itself, so that one serves all layers and prompts.
    """

    def observe(self, observation: Observation, earlier: Any) -> Any:
        """What `score` will need of these tokens and of the earlier ones (`earlier` is None at first)."""

    def score(
        self, layer: AttentionLayer, summary: Any, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores (B, H_kv, T) float32, not negative, higher is better.

        Args:
            layer: the attention layer.
            summary: what `observe` returned for the whole prompt.
            keys, values: (B, H_kv, T, D), keys rotated.
            valid: (B, T) bool, False for padding; None when there is none.
        """


@dataclass(frozen=True)
class PromptSummary:
    """What ShiftKV needs of a prompt besides its keys: (B, T) token statistics, and the last token's state."""

    token_means: torch.Tensor
    token_squares: torch.Tensor
    last: Observation


@dataclass(frozen=True)
class ShiftKV:
    """MM-ShiftKV (Findings of ACL 2026): votes by the attention of variance-expanded query proxies.

    Attributes:
        config: the settings; `budget` and what concerns storage are not looked at.
    """

    config: ShiftKVConfig

    def observe(self, observation: Observation, earlier: PromptSummary | None) -> PromptSummary:
        """Token statistics of all tokens so far, and a copy of the last token's state."""
        means, squares = token_statistics(observation.hidden_states)
        if earlier is not None:
            means = torch.cat([earlier.token_means, means], dim=1)
            squares = torch.cat([earlier.token_squares, squares], dim=1)
        tokens = observation.hidden_states.shape[1]
        return PromptSummary(means, squares, observation.tokens(tokens - 1, tokens).copied())

    def score(
        self,
        layer: AttentionLayer,
        summary: PromptSummary,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """Votes plus the last query's attention mass (method, step 6)."""
        config = self.config
        last = summary.last
        last_query = layer.rotate(layer.project_queries(last.hidden_states), last.cos, last.sin)
        if layer.index < config.last_token_layers:
            num_groups, stride = 1, 1
            hidden_states = last.hidden_states.expand(-1, LAST_TOKEN_PROXIES, -1)
        else:
            num_groups, stride = config.num_groups, config.future_stride or config.num_groups
            hidden_states = self._samples(layer.index, summary, valid)
        proxies = future_queries(layer, hidden_states, last.cos, last.sin, num_groups=num_groups, stride=stride)
        mass, last_mass = group_mass(
            proxies, last_query, keys, num_groups=num_groups, scaling=layer.scaling, valid=valid
        )
        return vote(mass, config.mass) + last_mass

    def _samples(self, index: int, summary: PromptSummary, valid: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        hidden_states = summary.last.hidden_states
        features = hidden_states.shape[-1]
        mean, deviation = prompt_statistics(
            summary.token_means, summary.token_squares, features, valid=valid, window=config.stats_window
        )
        noise = gaussian_noise(config.num_proxies, features, seed=config.seed, layer=index, device=hidden_states.device)
        return expanded_samples(mean, deviation, noise, gamma=config.gamma, dtype=hidden_states.dtype)
