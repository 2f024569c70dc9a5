"""A budget that covers the prompt gives what DynamicCache gives, to the bit."""

import pytest
import torch
from transformers import DynamicCache

import models
from mmshiftkv import ShiftKVCache

FAMILIES = ("qwen2_5_vl", "vicuna", "mistral")
NEW_TOKENS = 12


def generate(model, inputs, cache, **options):
    return model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def assert_same(one, other):
    assert one.sequences.equal(other.sequences)
    assert len(one.logits) == len(other.logits)
    for step, (mine, theirs) in enumerate(zip(one.logits, other.logits, strict=True)):
        assert mine.equal(theirs), f"logits of step {step} differ by {(mine - theirs).abs().max()}"


def assert_close(one, other, tolerance=1e-4):
    """The same tokens; attention over slots that are masked sums in another order."""
    assert one.sequences.equal(other.sequences)
    for mine, theirs in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_real_image_prompts(vision_case, family, attention, rows):
    case = vision_case(family, attention)
    inputs = case.prompts(rows)
    assert rows == 1 or not inputs["attention_mask"].all()
    expected = generate(case.model, inputs, DynamicCache(config=case.model.config))
    length = inputs["input_ids"].shape[1]
    for settings in ({"budget": length}, {"budget": 1.0}, {"budget": length + 1, "max_new_tokens": NEW_TOKENS}):
        cache = ShiftKVCache(case.model, **settings)
        found = generate(case.model, inputs, cache)
        if "max_new_tokens" in settings:
            assert_close(found, expected)
        else:
            assert_same(found, expected)
        assert cache.kept_indices(0).shape[-1] == length
        assert cache.report().tokens_stored == cache.get_seq_length() == cache.report().tokens_seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = models.text_model().to(dtype)
    inputs = models.left_padded([40, 17])
    expected = generate(model, inputs, DynamicCache(config=model.config))
    assert_same(generate(model, inputs, ShiftKVCache(model, budget=40)), expected)


@pytest.mark.parametrize("budget", [1, 4, 39])
def test_max_new_tokens_changes_storage_and_not_results(budget):
    model, inputs = models.text_model(), {"input_ids": models.prompt_ids()}
    growing, fixed = (ShiftKVCache(model, budget=budget, max_new_tokens=room) for room in (None, NEW_TOKENS))
    assert_close(generate(model, inputs, growing), generate(model, inputs, fixed))
    assert [layer.slots for layer in fixed.layers] == [budget + NEW_TOKENS] * 3


@pytest.mark.parametrize("family", ["vicuna", "qwen2_5_vl"])
def test_a_second_prompt_after_reset_and_a_second_cache_are_like_the_first(vision_case, family):
    case = vision_case(family)
    inputs, others = case.prompts(2), case.inputs(("Read line 2.", models.document_image(112, 196)))
    expected = generate(case.model, inputs, ShiftKVCache(case.model, budget=20))
    cache = ShiftKVCache(case.model, budget=20)
    generate(case.model, others, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.kept_indices(0) is None
    assert_same(generate(case.model, inputs, cache), expected)
    assert_same(generate(case.model, inputs, ShiftKVCache(case.model, budget=20)), expected)
