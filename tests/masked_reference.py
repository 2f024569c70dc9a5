"""The reference for a compressed cache: a full cache whose dropped entries are masked out, head by head."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel


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
    handles = []
    for module in model.modules():
        if not hasattr(module, "q_proj") or kept.get(getattr(module, "layer_idx", None)) is None:
            continue
        chosen = kept[module.layer_idx]
        seen = chosen.new_zeros(*chosen.shape[:2], valid.shape[1], dtype=torch.bool).scatter_(-1, chosen, True)
        seen = (seen & valid[:, None]).repeat_interleave(module.num_key_value_groups, dim=1)

        def mask(module: Any, args: Any, kwargs: dict[str, Any], seen: torch.Tensor = seen) -> Any:
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            before = int(cache.get_seq_length(module.layer_idx)) - seen.shape[-1]
            if before < 0:
                return None
            shown = _shown(seen, before, kwargs["hidden_states"].shape[1], later)
            if module.config._attn_implementation == "eager":
                hidden = torch.finfo(kwargs["hidden_states"].dtype).min
                shown = torch.zeros_like(shown, dtype=kwargs["hidden_states"].dtype).masked_fill(~shown, hidden)
            return args, {**kwargs, "attention_mask": shown}

        handles.append(module.register_forward_pre_hook(mask, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
