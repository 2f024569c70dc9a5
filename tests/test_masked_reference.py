"""Decoding on a compressed cache is decoding on the full cache with the dropped entries masked out, head by head."""

import contextlib

import pytest
import torch
from transformers import DynamicCache

import models
from mmshiftkv import ShiftKVCache

NEW_TOKENS = 8


def generate(model, inputs, cache):
    return model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


@contextlib.contextmanager
def dropped_entries_masked(model, kept, valid):
    """While decoding, each attention module sees of the prompt, valid: (B, T) bool, only what its heads kept."""
    tokens = valid.shape[1]
    handles = []
    for module in model.modules():
        if not hasattr(module, "q_proj") or getattr(module, "layer_idx", None) is None:
            continue
        chosen = kept[module.layer_idx]
        seen = chosen.new_zeros(*chosen.shape[:2], tokens, dtype=torch.bool).scatter_(-1, chosen, True) & valid[:, None]
        seen = seen.repeat_interleave(module.num_key_value_groups, dim=1)[:, :, None]

        def mask(module, args, kwargs, seen=seen):
            if kwargs["hidden_states"].shape[1] > 1:
                return None
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            later = cache.get_seq_length(module.layer_idx) + 1 - tokens
            shown = torch.cat([seen, seen.new_ones(*seen.shape[:3], later)], dim=-1)
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


def assert_decodes_like_the_masked_full_cache(model, inputs, budget, tolerance=2e-4, **settings):
    cache = ShiftKVCache(model, budget=budget, **settings)
    compressed = generate(model, inputs, cache)
    kept = {index: cache.kept_indices(index) for index in range(len(cache.layers))}
    valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert all(indices.shape[-1] == min(budget, valid.shape[1]) for indices in kept.values())
    assert cache.get_seq_length() == valid.shape[1] + NEW_TOKENS - 1
    with dropped_entries_masked(model, kept, valid):
        masked = generate(model, inputs, DynamicCache(config=model.config))
    for step, (mine, theirs) in enumerate(zip(compressed.logits, masked.logits, strict=True)):
        # float32: the sums run over fewer terms, in another order
        torch.testing.assert_close(
            mine, theirs, atol=tolerance, rtol=tolerance, msg=lambda text, step=step: f"step {step}: {text}"
        )
    assert compressed.sequences.equal(masked.sequences)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna", "mistral"])
def test_real_image_prompts(vision_case, family, attention, rows):
    case = vision_case(family, attention)
    assert_decodes_like_the_masked_full_cache(case.model, case.prompts(rows), budget=24)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("budget", [1, 2, 17, 39])
def test_budgets_and_head_counts(kv_heads, budget):
    model = models.text_model("qwen3", num_key_value_heads=kv_heads)
    assert_decodes_like_the_masked_full_cache(model, {"input_ids": models.prompt_ids(2)}, budget)


@pytest.mark.parametrize("budget", [3, 12, 25])
def test_left_padding_with_rows_shorter_than_the_budget(budget):
    inputs = models.left_padded([30, 11, 2])
    assert_decodes_like_the_masked_full_cache(models.text_model("qwen2"), inputs, budget)


@pytest.mark.parametrize(
    "settings", [{"last_token_layers": 2}, {"stats_window": 7}, {"gamma": 0}, {"future_stride": 1}]
)
def test_other_settings(settings):
    model, inputs = models.text_model("qwen2"), {"input_ids": models.prompt_ids()}
    assert_decodes_like_the_masked_full_cache(model, inputs, budget=9, **settings)
