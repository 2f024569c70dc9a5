"""One batch of several caches: prompts that were compressed one by one are decoded together."""

from collections.abc import Sequence

import torch

from .cache import PrefillSelectionCache
from .checks import check_integer
from .storage.held import HeldLayer


def join(caches: Sequence[PrefillSelectionCache], *, max_new_tokens: int | None = None) -> PrefillSelectionCache:
    """A new cache whose rows are those of the given caches, in their order; these stay as they are.

    Compressed prompts hold the same number of tokens whatever their lengths were, so they fit into one batch, and no
    batch of whole prompts is ever in memory.  Rows of different lengths count as left-padded to the longest one: give
    `generate` ids and an `attention_mask` of (B, length + new) that are padded on the left in the same way, and each
    row's positions go on where its own prompt ended.  Keys keep the rotation of the positions they were stored with.
    With Qwen-VL models the `rope_deltas` of the rows must be joined too (docs/conversations.md, "Joining prompts").

    What was joined counts as the prompt of the new cache.

    Args:
        caches: of one model and class, their prompts complete.
        max_new_tokens: room behind what is held, in storage of a fixed size, so that decoding is compiled; None:
            storage grows.

    Raises:
        TypeError, ValueError: no caches, of several classes or models, a prompt that is not complete, layers of other
            kinds than full attention, or compressed rows that hold different numbers of tokens.
    """
    caches = list(caches)
    _check(caches)
    if max_new_tokens is not None:
        check_integer("max_new_tokens", max_new_tokens, minimum=1)
    held = [cache.held_layers() for cache in caches]
    seen = max(layer.seen for layers in held for layer in layers.values())
    stored = max(layer.stored for layers in held for layer in layers.values())
    for number, layers in enumerate(held):
        for layer in layers.values():
            if layer.stored < min(layer.seen, stored):
                raise ValueError(
                    f"caches[{number}] holds {layer.stored} tokens of {layer.seen}, another holds {stored}: compressed "
                    "caches must hold the same number (the same budget, and the same number of later tokens)"
                )
    joined = {index: _joined([layers[index] for layers in held], seen, stored) for index in held[0]}
    return caches[0].with_layers(joined, max_new_tokens)


def _check(caches: list[PrefillSelectionCache]) -> None:
    if not caches:
        raise ValueError("caches is empty: there is nothing to join")
    for number, cache in enumerate(caches):
        if not isinstance(cache, PrefillSelectionCache):
            raise TypeError(f"caches[{number}] is a {type(cache).__name__}, not a cache of mmshiftkv")
        if type(cache) is not type(caches[0]):
            raise ValueError(
                f"caches[{number}] is a {type(cache).__name__}, caches[0] a {type(caches[0]).__name__}: join caches of "
                "one kind"
            )
        if not cache.is_of_model_of(caches[0]):
            raise ValueError(f"caches[{number}] was built for another model than caches[0]")


def _joined(layers: list[HeldLayer], seen: int, stored: int) -> HeldLayer:
    """One layer with the rows of several, as if all were left-padded to `seen` columns and held `stored` of them."""
    columns, parts = [], []
    for layer in layers:
        missing = stored - layer.stored
        padding = torch.arange(seen - stored, seen - layer.stored, device=layer.keys.device)
        shape = (*layer.keys.shape[:2], missing)
        columns.append(torch.cat([padding.expand(shape), layer.columns + seen - layer.seen], dim=2))
        parts.append([torch.nn.functional.pad(part, (0, 0, missing, 0)) for part in (layer.keys, layer.values)])
    keys, values = (torch.cat(part) for part in zip(*parts, strict=True))
    kept = torch.cat(columns) if stored < seen else None
    return HeldLayer(kept, keys, values, seen, prompt_stored=stored)
