"""What a selected layer holds, apart from how it is stored: for files, and for rows of several caches."""

from dataclasses import dataclass, replace

import torch

from .base import SelectedLayer


@dataclass(frozen=True)
class HeldLayer:
    """The tokens of one layer.

    Attributes:
        kept: (B, H_kv, C) int64, the columns of the prompt that are held; None: all that were seen.
        keys, values: (B, H_kv, stored, D).
        seen: tokens seen.
        prompt_stored: how many of the stored tokens belong to the prompt.
        slots: tokens that there is room for, in storage of a fixed size; None: where that has not been decided.
    """

    kept: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    seen: int
    prompt_stored: int
    slots: int | None = None

    @property
    def stored(self) -> int:
        """Tokens held."""
        return self.keys.shape[2]

    def to(self, device: torch.device) -> "HeldLayer":
        """The same on another device."""
        kept = None if self.kept is None else self.kept.to(device)
        return replace(self, kept=kept, keys=self.keys.to(device), values=self.values.to(device))

    @property
    def columns(self) -> torch.Tensor:
        """(B, H_kv, stored) int64: which of the seen columns each slot holds."""
        rows, heads, stored, _ = self.keys.shape
        every = torch.arange(self.seen, device=self.keys.device).expand(rows, heads, -1)
        if self.kept is None:
            return every
        return torch.cat([self.kept, every[:, :, self.seen - stored + self.prompt_stored :]], dim=2)


def held_by(layer: SelectedLayer) -> HeldLayer:
    """What a layer holds whose prompt has ended; keys and values are views of its storage."""
    assert layer.allocated is not None
    stored = layer.stored
    keys, values = (part[:, :, :stored] for part in layer.allocated)
    kept = layer.kept_indices if layer.dropped else None
    return HeldLayer(kept, keys, values, layer.seen, layer.prompt_stored, getattr(layer, "slots", None))
