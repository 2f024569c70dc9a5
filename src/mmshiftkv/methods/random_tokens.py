"""Random tokens as a method."""

from dataclasses import dataclass

import torch

from ..checks import check_integer
from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer
from .base import Method

_BLOCK = 4096


@dataclass(frozen=True)
class Random(Method):
    """Keeps random tokens: what any method must beat.

    Each layer has its own generator, and torch's global random state is neither read nor changed.  The number of a
    token depends on its distance from the prompt's end and on the head alone, so that padding in front of a row changes
    nothing, nor does it matter how many processes share the heads.

    Attributes:
        seed: seed of the numbers, from 0 to 2**32 - 1.

    Raises:
        TypeError, ValueError: a seed out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, minimum=0, maximum=2**32 - 1)

    def observe(self, layer: AttentionLayer, inputs: LayerInput, earlier: None) -> None:
        """Nothing."""

    def score(
        self,
        layer: AttentionLayer,
        summary: None,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """Uniform numbers, the same for all rows."""
        _, kv_heads, tokens, _ = keys.shape
        first, all_heads = layer.heads.place(kv_heads)
        generator = torch.Generator(keys.device).manual_seed((self.seed << 16) + layer.index)
        # Block by block: of a longer draw the first numbers need not be those of a shorter one.
        blocks = [
            torch.rand(all_heads, _BLOCK, generator=generator, device=keys.device) for _ in range(0, tokens, _BLOCK)
        ]
        own = torch.cat(blocks, dim=1)[first : first + kv_heads, :tokens]
        return own.flip(1).expand(*keys.shape[:3])
