import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

import models
from mmshiftkv import ShiftKVCache
from mmshiftkv.model.padding import PromptPadding, valid_columns


def prefill(model, inputs, budget, **settings):
    cache = ShiftKVCache(model, budget=budget, **settings)
    with torch.no_grad():
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits
    return cache, logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [1, 6, 13, 25])
def test_a_row_selects_the_same_tokens_as_alone(attention, budget):
    model = models.text_model("qwen3", attention=attention)
    lengths = [30, 13, 4]
    inputs = models.left_padded(lengths)
    together, _ = prefill(model, inputs, budget)
    for row, length in enumerate(lengths):
        padding = 30 - length
        alone, _ = prefill(model, {"input_ids": inputs["input_ids"][row : row + 1, padding:]}, budget)
        for layer in range(3):
            kept = together.kept_indices(layer)[row]
            valid = kept[kept >= padding].view(kept.shape[0], -1) - padding
            assert valid.equal(alone.kept_indices(layer)[0])
            # What room is left holds the padding nearest to the tokens.
            assert kept[:, : budget - valid.shape[1]].eq(torch.arange(padding - budget + valid.shape[1], padding)).all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna"])
def test_image_prompts_in_a_batch_select_the_same_tokens_as_alone(vision_case, family):
    case = vision_case(family)
    batch = case.prompts(3)
    together, _ = prefill(case.model, batch, 20)
    width = batch["input_ids"].shape[1]
    sizes = [(224, 168), (140, 280), (112, 112)]
    questions = ["What is the Total?", "What are the Name and the Date?", "Read line 1."]
    for row, (question, size) in enumerate(zip(questions, sizes, strict=True)):
        inputs = case.inputs((question, models.document_image(*size)))
        alone, _ = prefill(case.model, inputs, 20)
        padding = width - inputs["input_ids"].shape[1]
        same = [
            (together.kept_indices(layer)[row] - padding == alone.kept_indices(layer)[0]).float().mean()
            for layer in range(len(alone.layers))
        ]
        # A batch rounds otherwise than a single row, so scores that nearly tie may change places.
        assert min(same) > 0.9
        assert sum(same) / len(same) > 0.98


WRONG_MASKS = [
    ([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], "row 0 has padding on the right"),
    ([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], "row 1 has padding between tokens"),
    ([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], "row 1 has nothing but padding"),
]


@pytest.mark.parametrize(("mask", "words"), WRONG_MASKS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_elsewhere_than_on_the_left_is_refused(attention, mask, words):
    model = models.text_model(attention=attention)
    cache = ShiftKVCache(model, budget=3)
    inputs = {"input_ids": models.prompt_ids(2, 5), "attention_mask": torch.tensor(mask)}
    with pytest.raises(ValueError, match=f"attention_mask: {words}.*padding_side"), torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0
    assert models.hooks_on(model) == 0


@pytest.mark.parametrize(("mask", "words"), WRONG_MASKS[:2])
@pytest.mark.parametrize("reserved", [None, 3])
def test_any_padding_does_when_the_budget_covers_the_prompt(mask, words, reserved):
    model = models.text_model()
    inputs = {"input_ids": models.prompt_ids(2, 5), "attention_mask": torch.tensor(mask)}
    logits = []
    for cache in (DynamicCache(config=model.config), ShiftKVCache(model, budget=100, max_new_tokens=reserved)):
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
            later = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
            step = model(models.prompt_ids(2, 1), attention_mask=later, past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    torch.testing.assert_close(*logits, atol=0 if reserved is None else 1e-5, rtol=0 if reserved is None else 1e-5)


def test_every_kind_of_mask_says_the_same():
    columns = torch.tensor([[False, True, True, True], [True] * 4])
    causal = torch.ones(4, 4, dtype=torch.bool).tril() & columns[:, None, None]
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~causal, torch.finfo(torch.float32).min)
    block = create_block_mask(
        lambda b, h, q, k: (q >= k) & columns[b, k], B=2, H=None, Q_LEN=4, KV_LEN=4, device="cpu", BLOCK_SIZE=4
    )
    for mask in (columns.long(), columns, causal, additive, additive.half().clamp(min=-60000), block):
        assert valid_columns(mask, 2, 4, torch.device("cpu")).equal(columns)
    assert valid_columns(None, 2, 4, torch.device("cpu")) is None
    assert valid_columns(causal[1:], 2, 4, torch.device("cpu")).all()
    with pytest.raises(TypeError, match="attention_mask of type str"):
        valid_columns("causal", 2, 4, torch.device("cpu"))


def test_a_mask_without_padding_counts_as_none():
    padding = PromptPadding(torch.ones(2, 5), 2, 5, torch.device("cpu"))
    assert padding.valid(torch.device("cpu")) is None


def test_a_second_turn_may_be_padded_in_front():
    """Tokens after the prompt are all stored, so their padding lines up with the mask wherever it is."""
    model = models.text_model()
    first = models.prompt_ids(2, 30)
    turn = models.left_padded([6, 3], seed=5)
    mask = torch.cat([torch.ones(2, 30, dtype=torch.long), turn["attention_mask"]], dim=1)
    together = ShiftKVCache(model, budget=8)
    with torch.no_grad():
        model(first, past_key_values=together, use_cache=True)
        positions = (mask.cumsum(1) - 1)[:, 30:]
        logits = model(
            turn["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=together, use_cache=True
        ).logits
        alone = ShiftKVCache(model, budget=8)
        model(first[1:], past_key_values=alone, use_cache=True)
        expected = model(turn["input_ids"][1:, 3:], past_key_values=alone, use_cache=True).logits
    torch.testing.assert_close(logits[1:, 3:], expected, atol=1e-4, rtol=1e-4)
