"""StreamingLLM as a method."""

from dataclasses import dataclass

import torch

from ..checks import check_integer
from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer
from .base import Method
from .columns import columns_of, first_tokens


@dataclass(frozen=True)
class StreamingLLM(Method):
    """StreamingLLM (Xiao et al., ICLR 2024, https://arxiv.org/abs/2309.17453): attention sinks and recent tokens.

    The keys keep their original rotary phase, as in kvpress; the paper moves them to their places in the cache.

    Attributes:
        sinks: first tokens that are kept (paper and kvpress: 4).
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        check_integer("sinks", self.sinks, minimum=0)

    @property
    def protected(self) -> int:
        """How many tokens are always kept: the sinks and the last."""
        return self.sinks + 1

    def observe(self, layer: AttentionLayer, inputs: LayerInput, earlier: None) -> None:
        """Nothing: only the place of a token counts."""

    def score(
        self,
        layer: AttentionLayer,
        summary: None,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """The later a token the higher; the sinks above all, the first one highest."""
        columns = columns_of(keys)
        scores = torch.where(first_tokens(keys, valid, self.sinks), 2 * keys.shape[2] - columns, columns)
        return scores.float()[:, None].expand(*keys.shape[:3])
