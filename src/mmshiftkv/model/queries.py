"""How a decoder layer makes its queries of made-up hidden states: rebuilt from its parts, or asked of the module."""

import copy
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shiftkv_kernels import rotate_queries

from .asking import StoredTokens, ask, parameters_of
from .facts import Facts, look_at
from .offload import with_weights
from .parallel import SharedHeads
from .positions import Factors, Positions, map_factors
from .precision import PLAIN_DTYPES
from .rebuilding import Rebuilder
from .rotary import Rotary

# Modules that have been looked at, and what was found.
_known: "weakref.WeakKeyDictionary[nn.Module, Facts]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class QueriesAhead:
    """Queries at later positions, and behind them that of the token before: (B, H, N + 1, D).

    Attributes:
        states: rotated already, or not.
        factors: what they are still to be rotated by, as `rotate_queries` takes it; () where they are rotated.
        backend: "auto", "triton" or "torch".
    """

    states: torch.Tensor
    factors: tuple[torch.Tensor, ...]
    backend: str

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, N, D) and (B, H, 1, D), rotated."""
        ahead, last = self.states[:, :, :-1], self.states[:, :, -1:]
        return rotate_queries(ahead, last, *self.factors, backend=self.backend) if self.factors else (ahead, last)


class AttentionLayer:
    """One attention module of a text decoder, as the maker of its queries.

    It belongs to the model, not to a cache: a deep copy of it is itself.

    Args:
        module: the attention module.
        index: of the layer.
        rotary: the decoder's rotary embedding for this layer.
        hidden_size: features of the module's input.
        last_position: the highest position that the model is made for.
        heads: the KV heads of the model, of which a process may hold a part.

    Raises:
        ValueError: it is not understood how the module makes its queries; the message says why.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        rotary: Rotary,
        hidden_size: int,
        last_position: int,
        heads: SharedHeads,
    ) -> None:
        self.module = module
        self.index = index
        self.rotary = rotary
        self.heads = heads
        self._hidden_size = hidden_size
        self.parameters = parameters_of(module)
        if module not in _known:
            try:
                _known[module] = look_at(module, rotary, hidden_size, last_position)
            except ValueError as error:
                raise ValueError(f"model: layer {index} ({type(module).__name__}) is not supported: {error}") from error
        self.facts = _known[module]
        self._parts = Rebuilder(module) if self.facts.is_rebuilt else None

    def asking(self) -> "AttentionLayer":
        """The same layer, which asks its module also where rebuilt queries are its own: for comparison."""
        twin = copy.copy(self)
        twin._parts = None
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionLayer":
        return self

    @property
    def scaling(self) -> float:
        """The factor on the logits."""
        return self.facts.scaling

    @property
    def softcap(self) -> float | None:
        """Logits are capped to softcap * tanh(logit / softcap); None: they are not."""
        return self.facts.softcap

    @property
    def sinks(self) -> torch.Tensor | None:
        """(H,), a learned logit of each query head, which takes part in the softmax and gives nothing; or None."""
        if not self.facts.has_sinks:
            return None
        with with_weights(self.module):
            sinks: Any = self.module.sinks
            return sinks.detach()

    @property
    def can_rotate(self) -> bool:
        """Whether `unrotated` and `rotate` are known."""
        return self._parts is not None or self.facts.rotation is not None

    def positions_of(self, hidden_states: torch.Tensor, given: dict[str, Any], cache: Any) -> Positions:
        """Where the tokens of a forward pass are, as the module is told.

        Args:
            hidden_states: (B, t, d), its input.
            given: its arguments by name.
            cache: the cache, which holds the tokens before.
        """
        if self._parts is not None:
            return Positions(given.get("position_embeddings"))
        ids = given.get("position_ids") if "position_ids" in self.parameters else None
        before = cache.get_seq_length(self.index)
        columns = torch.arange(hidden_states.shape[1], device=hidden_states.device) + before
        return Positions(given.get("position_embeddings"), ids, columns)

    def queries(self, hidden_states: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Rotated queries (B, H, n, D) of attention inputs (B, n, d) at n positions."""
        if self._parts is not None:
            return self._parts.rotate(self._parts.project("q", hidden_states), positions.factors)
        return ask(self.module, self._of_weights(hidden_states), positions).query

    def queries_ahead(
        self, hidden_states: torch.Tensor, last: Positions, *, count: int, stride: int, backend: str
    ) -> "QueriesAhead":
        """Queries of made-up tokens at `count` positions after a token, over and over, and the token's own query.

        Args:
            hidden_states: (B, N + 1, d), N a multiple of `count`; the token's own state is the last.
            last: the position of the token.
            stride: distance between the positions.
            backend: "auto", "triton" or "torch".

        Returns:
            The queries, rotated when they are asked for.
        """
        if self._parts is not None and (factors := self._factors_ahead(last, count, stride)) is not None:
            # One projection makes the proxies and the last token's own query.
            return QueriesAhead(self._parts.project("q", hidden_states), factors, backend)
        groups = (hidden_states.shape[1] - 1) // count
        ahead = self.rotary.ahead(last, count=count, stride=stride).repeated(groups)
        return QueriesAhead(self.queries(hidden_states, ahead.followed_by(last)), (), backend)

    def read_ahead(
        self, last: Positions, *, count: int, stride: int
    ) -> tuple[tuple[torch.Tensor, ...], Hashable] | None:
        """What `queries_ahead` reads besides the states, tensors and all else; None where it may do anything."""
        if self._parts is None or (factors := self._factors_ahead(last, count, stride)) is None:
            return None
        parts = self._parts.read()
        return None if parts is None else ((*factors, *parts[0]), parts[1])

    def _factors_ahead(self, last: Positions, count: int, stride: int) -> tuple[torch.Tensor, ...] | None:
        """What `rotate_queries` rotates queries ahead by; None where it cannot do that."""
        if not self.facts.pairs_halves or last.factors is None:
            return None
        key = (self.rotary.key, count, stride)
        if key not in last.made:
            factors = self.rotary.cos_and_sin(last.factors)
            assert factors is not None
            steps = self.rotary.steps(count, stride, factors[0].device)
            assert isinstance(steps, tuple)
            last.made[key] = *factors, steps[0][0], steps[1][0]
        return last.made[key]

    def unrotated(self, hidden_states: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Queries (B, H, n, D) of attention inputs (B, n, d) before they are rotated to their positions."""
        if self._parts is not None:
            return self._parts.project("q", hidden_states)
        neutral = positions.with_factors(self.rotary.neutral(positions.factors))
        return ask(self.module, self._of_weights(hidden_states), neutral).query

    def rotate(self, states: torch.Tensor, factors: Factors) -> torch.Tensor:
        """Rotates (B, H, n, D), linearly, by factors of n positions."""
        if self._parts is not None:
            return self._parts.rotate(states, factors)
        assert self.facts.rotation is not None
        if factors is None:
            return states
        in_order = factors if isinstance(factors, torch.Tensor) else self.rotary.cos_and_sin(factors)
        return self.facts.rotation(states, in_order)

    @property
    def stores_latents(self) -> bool:
        """Whether what is stored are latents of all heads, of which attention makes its keys and values."""
        return self.facts.is_latent

    def attended(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that attention makes of stored ones, which are these themselves but for latents.

        Args:
            keys, values: (B, H_stored, T, D) and (B, H_stored, T, D_v), as they are stored.

        Returns:
            (B, H_kv, T, D) and (B, H_kv, T, D_v).
        """
        if not self.facts.is_latent:
            return keys, values
        # It takes a token to ask; what it is does not matter to the keys of those stored.
        place = torch.zeros(1, 1, dtype=torch.long, device=keys.device)
        token = Positions(
            map_factors(lambda factor: _like(factor, keys.dtype), self.rotary.factors(place)), place, place[0]
        )
        hidden_states = keys.new_zeros(keys.shape[0], 1, self._hidden_size)
        cache = StoredTokens(token.columns, keys, values)
        handed = ask(self.module, self._of_weights(hidden_states), token, cache=cache)
        return handed.keys, handed.values

    def of_stored(self, scores: torch.Tensor, heads: int) -> torch.Tensor:
        """Scores (B, H_kv, T) as those of what is stored, (B, heads, T): heads that share it share its tokens."""
        if scores.shape[1] == heads:
            return scores
        if self.facts.repeats_stored_heads:
            return scores.unflatten(1, (-1, heads)).mean(dim=1)
        return scores.unflatten(1, (heads, -1)).mean(dim=2)

    def _of_weights(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The states in the dtype of the module's weights: the model's own may be run under autocast."""
        dtype = next((one.dtype for one in self.module.parameters() if one.dtype in PLAIN_DTYPES), hidden_states.dtype)
        return hidden_states.to(dtype)


def _like(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return factor if factor.is_complex() else factor.to(dtype)
