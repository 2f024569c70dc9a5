"""What has been said so far, as tokens, and the cache that holds them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from ..cache import PrefillSelectionCache
from ..decode.loop import decode_ahead
from ..model.arguments import CACHE_ARGUMENT
from ..storage.base import SelectedLayer
from .ending import Ending
from .positions import Offsets, later_positions, offsets_of, put_back
from .template import NewTokens


@dataclass
class Transcript:
    """A batch of conversations: ids and mask of all columns, the cache, and the model's offsets of their positions.

    The cache has seen all columns, or all but the last one.

    Attributes:
        model: the model that answers.
        cache: holds what has been said.
        ids: (B, T) int64; None before the first turn.
        mask: (B, T) int64, 0 for padding.
        offsets: what the model keeps of the conversation's positions.
    """

    model: PreTrainedModel
    cache: PrefillSelectionCache
    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    offsets: Offsets | None = None

    @property
    def width(self) -> int:
        """Columns so far."""
        return 0 if self.ids is None else self.ids.shape[1]

    def copied(self) -> "Transcript":
        """One that goes its own way."""
        return Transcript(self.model, copy.deepcopy(self.cache), self.ids, self.mask, self.offsets)

    def answer(
        self, new: NewTokens, ending: Ending, options: dict[str, Any], end_tokens: list[int]
    ) -> list[torch.Tensor]:
        """The answers to new tokens, ids (t,) for each row; without them, all stays as it was.

        Args:
            new: what comes behind the columns so far.
            ending: where answers end besides; it serves this call only.
            options: of `generate`.
            end_tokens: ids that end an answer.
        """
        layers = _Layers(self.cache)
        try:
            inputs = self._inputs(new)
            custom = {"custom_generate": decode_ahead} if self.cache.is_compileable else {}
            ends = StoppingCriteriaList([ending])
            given = {**inputs, CACHE_ARGUMENT: self.cache, "stopping_criteria": ends, **custom, **options}
            ids = self.model.generate(**given)
        except BaseException:
            layers.put_back()
            raise
        asked = inputs["input_ids"].shape[1]
        answers = ending.mask(ids, asked, end_tokens)
        mask = torch.cat([inputs["attention_mask"], answers], dim=1)
        # The last column has not been fed; if it ends the answer of each row, the template writes it.
        fed = ids.shape[1] - int(not mask[:, -1].any())
        self.ids, self.mask, self.offsets = ids[:, :fed], mask[:, :fed], offsets_of(self.model)
        return [row[shown.bool()] for row, shown in zip(ids[:, asked:], answers, strict=True)]

    def _inputs(self, new: NewTokens) -> dict[str, Any]:
        put_back(self.model, self.offsets)
        if self.ids is None or self.mask is None:
            return {"input_ids": new.ids, "attention_mask": new.mask, **new.types, **new.media}
        mask = torch.cat([self.mask, new.mask], dim=1)
        inputs = {"input_ids": torch.cat([self.ids, new.ids], dim=1), "attention_mask": mask}
        if new.media:
            assert self.offsets is not None
            positions = later_positions(self.model, new, mask, self.offsets)
            if positions is not None:
                inputs["position_ids"] = self._with_unfed(positions)
            before = inputs["input_ids"].shape[1] - new.ids.shape[1]
            inputs |= {name: torch.nn.functional.pad(part, (before, 0)) for name, part in new.types.items()}
            inputs |= new.media
        return inputs

    def _with_unfed(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions (4, B, t) behind that of the last column, if the cache has not seen it yet."""
        assert self.mask is not None
        if int(self.cache.get_seq_length()) == self.width:
            return positions
        text = (self.mask.sum(1) - 1).clamp_min(0)
        offset = self.offsets[0] if self.offsets else None
        other = text if offset is None else text + offset[:, 0].to(text.device)
        last = torch.stack([text, other, other, other])[:, :, None]
        return torch.cat([last, positions], dim=2)


class _Layers:
    """What the layers of a cache held, to go back there."""

    def __init__(self, cache: PrefillSelectionCache) -> None:
        self._cache = cache
        self._is_empty = int(cache.get_seq_length()) == 0
        self._stored = [layer.stored if isinstance(layer, SelectedLayer) else None for layer in cache.layers]
        self._others = {} if self._is_empty else self._copies()

    def _copies(self) -> dict[int, Any]:
        """Of the layers of other kinds, which cannot always be cropped."""
        return {
            index: copy.deepcopy(layer)
            for index, layer in enumerate(self._cache.layers)
            if not isinstance(layer, SelectedLayer)
        }

    def put_back(self) -> None:
        if self._is_empty:
            self._cache.reset()
            return
        for layer, stored in zip(self._cache.layers, self._stored, strict=True):
            if stored is not None:
                layer.crop(stored - layer.stored)
        for index, layer in self._others.items():
            self._cache.layers[index] = layer
