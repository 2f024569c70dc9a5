"""The reference for a compressed cache: a full cache whose dropped entries are masked out, head by head."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_CACHE_ARGUMENTS = {"cache", "past_key_values", "layer_past"}


@contextlib.contextmanager
def dropped_entries_masked(
    model: PreTrainedModel,
    kept: Mapping[int, torch.Tensor | None],
    valid: torch.Tensor,
    later: torch.Tensor | None = None,
) -> Iterator[None]:
    """In passes after the prompt, each attention module sees of the prompt only what its heads kept.

    Args:
        model: the model.
        kept: by layer, (B, H_kv, C), the prompt's columns that are kept; None: the layer is left alone.
        valid: (B, T) bool, False for padding of the prompt.
        later: (B, L) bool, False for padding in the columns after the prompt; None: there is none.
    """
    with contextlib.ExitStack() as hooks:
        for module in _attention_modules(model):
            source = _source_of_keys(module, kept)
            chosen = None if source is None else kept.get(source)
            if source is None or chosen is None:
                continue
            seen = chosen.new_zeros(*chosen.shape[:2], valid.shape[1], dtype=torch.bool).scatter_(-1, chosen, True)
            mask = _Mask(_by_query_head(module, seen & valid[:, None]), source, later)
            hooks.callback(module.register_forward_pre_hook(mask, with_kwargs=True).remove)
        yield


class _Mask:
    """A hook that replaces the mask of one attention module, but in the pass of the prompt."""

    def __init__(self, seen: torch.Tensor, source: int, later: torch.Tensor | None) -> None:
        self._seen = seen
        self._source = source
        self._later = later

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        given = {**bound.arguments.pop("kwargs", {}), **bound.arguments}
        cache = next(given[name] for name in _CACHE_ARGUMENTS if name in given)
        hidden_states = next(iter(bound.arguments.values()))
        tokens = hidden_states.shape[1]
        before = int(cache.get_seq_length(self._source)) - self._seen.shape[-1]
        if module.layer_idx != self._source:
            before -= tokens  # they have been stored in this pass
        if before < 0:
            return None
        shown, usual = _shown(self._seen, before, tokens, self._later), given.get("attention_mask")
        if isinstance(usual, torch.Tensor) and usual.is_floating_point():
            # Biases of positions come in the mask.
            shown = usual.masked_fill(~shown, torch.finfo(usual.dtype).min)
        elif module.config._attn_implementation == "eager":
            shown = torch.zeros_like(shown, dtype=hidden_states.dtype).masked_fill(
                ~shown, torch.finfo(hidden_states.dtype).min
            )
        return (), {**given, "attention_mask": shown}


def _attention_modules(model: PreTrainedModel) -> list[Any]:
    """The innermost modules that belong to a layer and take a cache and a mask."""
    found = [module for module in model.modules() if _takes_cache_and_mask(module)]
    return [each for each in found if not any(other is not each and other in found for other in each.modules())]


def _takes_cache_and_mask(module: nn.Module) -> bool:
    names = inspect.signature(module.forward).parameters
    return hasattr(module, "layer_idx") and "attention_mask" in names and not _CACHE_ARGUMENTS.isdisjoint(names)


def _source_of_keys(module: Any, kept: Mapping[int, torch.Tensor | None]) -> int | None:
    """The layer whose stored keys a module attends to, if these were selected from."""
    index, source = module.layer_idx, module.layer_idx
    if getattr(module, "is_kv_shared_layer", False):
        kinds = module.config.layer_types
        own = range(module.config.num_hidden_layers - module.config.num_kv_shared_layers)
        source = max(each for each in own if kinds[each] == kinds[index])
    return source if kept.get(source) is not None else None


def _by_query_head(module: Any, seen: torch.Tensor) -> torch.Tensor:
    """(B, H_kv, T) as the query heads have it, (B, H, T)."""
    if hasattr(module, "kv_proj") and hasattr(module, "top_k"):
        return seen.repeat(1, module.top_k, 1)  # JetMoE: each of its experts has a head for every KV head
    groups = getattr(module, "num_key_value_groups", None)
    return seen.repeat_interleave(groups or module.config.num_attention_heads // seen.shape[1], dim=1)


def _shown(seen: torch.Tensor, before: int, queries: int, later: torch.Tensor | None) -> torch.Tensor:
    """What `queries` tokens attend to that come `before` columns behind the prompt: (B, H, queries, columns)."""
    columns = before + queries
    causal = seen.new_ones(queries, columns).tril(before)
    if later is not None:
        # A padding token sees itself at least, as a row of nothing has no attention.
        causal = causal & (later[:, None, None, :columns] | seen.new_ones(queries, columns).triu(before))
    return torch.cat(
        [seen[:, :, None].expand(-1, -1, queries, -1), causal.expand(*seen.shape[:2], queries, columns)], dim=-1
    )
