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
        masks = {kind: None if mask is None else mask.next() for kind, mask in self._masks.items()}
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
        self._mask = mask

    def next(self) -> torch.Tensor:
        """One column more."""
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return self._mask


class _StepMask:
    """A mask (B, 1, 1, slots) of True or False, or of what is added to the logits."""

    def __init__(self, mask: torch.Tensor, layer: Any) -> None:
        self._mask = mask
        self._layer = layer
        self._window = layer.sliding_window if isinstance(layer, WindowLayer) else None
        self._dropped = layer.dropped
        is_bool = mask.dtype == torch.bool
        self._shown = True if is_bool else 0.0
        self._hidden = False if is_bool else torch.finfo(mask.dtype).min

    def next(self) -> torch.Tensor:
        """Shows the slot that the next step writes as well, and hides what leaves the window."""
        self._follow_storage()
        filled = self._layer.filled.view(1)
        if self._window is not None:
            gone = torch.arange(self._layer.slots, device=filled.device) <= filled - self._window
            self._mask.masked_fill_(gone, self._hidden)
        return self._mask.index_fill_(-1, filled, self._shown)

    def _follow_storage(self) -> None:
        """Moves with storage that has become larger, or whose tokens have moved to its front."""
        moved = self._layer.dropped - self._dropped
        more = self._layer.slots - self._mask.shape[-1]
        if moved or more:
            self._mask = torch.nn.functional.pad(self._mask[..., moved:], (0, moved + more), value=self._hidden)
            self._dropped += moved
