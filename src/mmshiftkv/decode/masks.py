"""Attention masks of decoding steps, made once and changed in place."""

from typing import Any

import torch

from ..cache import PrefillSelectionCache
from ..storage.base import SelectedLayer
from ..storage.windows import WindowLayer

_OF_WINDOWS = "sliding_attention"


class StepMasks:
    """The attention masks of one step after another.

    Args:
        first: those of the first step, as `generate` makes them: one (B, 1, 1, slots), or several by kind of layer;
            None for a kind of layer that needs none.  Where the model makes them itself: None, or (B, columns seen).
        cache: the cache that is decoded on.
    """

    def __init__(self, first: Any, cache: PrefillSelectionCache) -> None:
        self._is_one = not isinstance(first, dict)
        masks = {"": first} if self._is_one else first
        self._masks = {kind: _step_mask(kind, mask, cache) for kind, mask in masks.items()}

    def next(self) -> Any:
        """Those of the next step, for which slots have been reserved."""
        self.follow_storage()
        return self.show()

    def follow_storage(self) -> None:
        """Moves with what slots have been reserved for the next step; nothing of it is the same in every step."""
        for mask in self._masks.values():
            if mask is not None:
                mask.follow_storage()

    @property
    def current(self) -> Any:
        """Those of the step that is prepared."""
        masks = {kind: None if mask is None else mask.mask for kind, mask in self._masks.items()}
        return masks[""] if self._is_one else masks

    def show(self) -> Any:
        """Those of the next step; on the device, and the same work in every step for masks of all slots."""
        masks = {kind: None if mask is None else mask.show() for kind, mask in self._masks.items()}
        return masks[""] if self._is_one else masks


def _step_mask(kind: str, mask: torch.Tensor | None, cache: PrefillSelectionCache) -> Any:
    if mask is None:
        return None
    if mask.ndim == 2:
        return _PaddingMask(mask)
    wanted = WindowLayer if kind == _OF_WINDOWS else SelectedLayer
    # All layers of a kind hold the same columns.
    return _StepMask(mask, next(layer for layer in cache.layers if isinstance(layer, wanted)))


class _PaddingMask:
    """A mask (B, columns) with 1 or True for all that is no padding."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def follow_storage(self) -> None:
        """Nothing: it holds all columns that were seen."""

    def show(self) -> torch.Tensor:
        """One column more."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self.mask


class _StepMask:
    """A mask (B, 1, 1, slots) of True or False, or of what is added to the logits."""

    def __init__(self, mask: torch.Tensor, layer: Any) -> None:
        self.mask = mask
        self._layer = layer
        self._window = layer.sliding_window if isinstance(layer, WindowLayer) else None
        self._dropped = layer.dropped
        is_bool = mask.dtype == torch.bool
        self._shown = True if is_bool else 0.0
        self._hidden = False if is_bool else torch.finfo(mask.dtype).min

    def show(self) -> torch.Tensor:
        """Shows the slot that the next step writes as well, and hides what leaves the window."""
        filled = self._layer.filled.view(1)
        if self._window is not None:
            gone = torch.arange(self._layer.slots, device=filled.device) <= filled - self._window
            self.mask.masked_fill_(gone, self._hidden)
        return self.mask.index_fill_(-1, filled, self._shown)

    def follow_storage(self) -> None:
        """Moves with storage that has become larger, or whose tokens have moved to its front."""
        moved = self._layer.dropped - self._dropped
        more = self._layer.slots - self.mask.shape[-1]
        if not moved and not more:
            return
        mask = torch.nn.functional.pad(self.mask[..., moved:], (0, moved + more), value=self._hidden)
        # A recorded step reads its mask where it was.
        self.mask = mask if more else self.mask.copy_(mask)
        self._dropped += moved
