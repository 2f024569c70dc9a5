"""The protocol of a method: from what a layer saw of a prompt to a score for each of its tokens."""

from typing import Any, Protocol

import torch

from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer


class Method(Protocol):
    """What a selecting cache asks of a method.

    A prompt is shown to `observe` in one piece or, when it is prefilled in chunks, in several; `score` then gets what
    the last call returned.  A method keeps nothing of a prompt in itself, so that one serves all layers and prompts.
    """

    def observe(self, layer: AttentionLayer, inputs: LayerInput, earlier: Any) -> Any:
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
