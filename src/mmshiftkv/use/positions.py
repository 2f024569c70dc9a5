"""Positions that a model keeps on itself, in no cache: each conversation has its own, and puts them back.

Qwen-VL models and those built like them number an image's tokens by row and column, so a conversation's next position
is not its number of tokens.  They keep the difference (`rope_deltas`) of the prompt that they saw last.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_NAME = "rope_deltas"
Offsets = tuple[torch.Tensor | None, ...]  # one for each module that keeps some, (B, 1)


def offsets_of(model: PreTrainedModel) -> Offsets:
    """What the model keeps now."""
    return tuple(getattr(module, _NAME) for module in _owners(model))


def put_back(model: PreTrainedModel, offsets: Offsets | None) -> None:
    """Has the model keep what it kept; None: nothing, as before its first prompt."""
    owners = _owners(model)
    for owner, value in zip(owners, offsets or (None,) * len(owners), strict=True):
        setattr(owner, _NAME, value)


def joined_offsets(offsets: Sequence[Offsets]) -> Offsets:
    """Those of several conversations as one batch."""
    joined = []
    for parts in zip(*offsets, strict=True):
        known = next((part for part in parts if part is not None), None)
        rows = [torch.zeros_like(known[:1]) if part is None else part for part in parts] if known is not None else []
        joined.append(torch.cat(rows) if rows else None)
    return tuple(joined)


def later_positions(model: PreTrainedModel, new: Any, mask: torch.Tensor, offsets: Offsets) -> torch.Tensor | None:
    """Positions of later tokens with images or videos among them, for models that keep offsets; None for others.

    An image's positions go on from the last one, so they are those of the new tokens alone, moved.

    Args:
        model: the model; it keeps the offsets behind the new tokens afterwards.
        new: the `NewTokens`.
        mask: (B, T) int64, of all columns, the new ones last.
        offsets: before the new tokens.

    Returns:
        (4, B, t) int64: positions as text, then time, height and width.

    Raises:
        ValueError: the model keeps offsets and cannot say how it numbers images.
    """
    owners = _owners(model)
    if not owners:
        return None
    (owner,), (offset,) = owners[:1], offsets[:1]
    count: Any = getattr(owner, "get_rope_index", None)
    if count is None:
        raise ValueError(f"images: {type(owner).__name__} takes them in the first turn only: it has no get_rope_index")
    given = {"input_ids": new.ids, "attention_mask": new.mask, **new.types, **new.media}
    taken = inspect.signature(count).parameters
    own, _ = count(**{name: value for name, value in given.items() if name in taken})
    text = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new.ids.shape[1] :]
    seen = mask[:, : -new.ids.shape[1]].sum(1, keepdim=True)
    moved = own + seen + (0 if offset is None else offset)
    shown = moved.masked_fill(new.mask[None] == 0, 0)
    after = shown.amax(dim=(0, 2)).unsqueeze(1) + 1 - mask.sum(1, keepdim=True)
    put_back(model, tuple(after for _ in owners))
    return torch.cat([text[None], shown])


def _owners(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, _NAME)]
