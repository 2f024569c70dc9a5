"""Decoding on a compressed cache is decoding on the full cache with the dropped entries masked out, head by head."""

import pytest
import torch
from transformers import DynamicCache

import models
from masked_reference import dropped_entries_masked
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
