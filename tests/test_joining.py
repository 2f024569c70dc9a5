"""Prompts that were compressed one by one decode in one batch as each does alone."""

import pytest
import torch
from torch._dynamo.utils import counters

import models
from caches import NEW_TOKENS, generate
from compiling import compiling
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, SnapKVCache, decode_ahead, join
from mmshiftkv.use.positions import joined_offsets, offsets_of, put_back
from tiny_llava import document_image

BUDGET = 16
LENGTHS = [40, 23, 61]


def prefilled(model, ids, budget=BUDGET, **settings):
    cache = ShiftKVCache(model, budget=budget, **settings)
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
    return cache


def left_padded(rows):
    """Rows of ids (1, T) as one batch."""
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.arange(width)[None] >= width - torch.tensor([row.shape[1] for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def assert_rows_are_as_alone(found, alone, tolerance=1e-4):
    for row, expected in enumerate(alone):
        assert found.sequences[row, -NEW_TOKENS:].equal(expected.sequences[0, -NEW_TOKENS:])
        for mine, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], atol=tolerance, rtol=tolerance)


MODES = {
    "growing": {},
    "fixed": {},
    "ahead": {"custom_generate": decode_ahead},
    "compiled": {"compile_config": compiling()},
    "compiled ahead": {"custom_generate": decode_ahead, "compile_config": compiling()},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_different_prompts_and_lengths(mode, attention):
    model = models.text_model(attention=attention)
    prompts = [models.prompt_ids(1, tokens, seed=tokens) for tokens in LENGTHS]
    caches = [prefilled(model, ids) for ids in prompts]
    joined = join(caches, max_new_tokens=None if mode == "growing" else 30)
    turns = [torch.cat([ids, models.prompt_ids(1, 4, seed=row)], dim=1) for row, ids in enumerate(prompts)]
    found = generate(model, joined, left_padded(turns), **MODES[mode])
    assert_rows_are_as_alone(found, [generate(model, *pair) for pair in zip(caches, turns, strict=True)])
    assert joined.report().tokens_seen == max(LENGTHS) + 4 + NEW_TOKENS - 1
    # A further turn, padded in the middle: rows are of different lengths again.
    mask = left_padded(turns)["attention_mask"]
    more = left_padded([models.prompt_ids(1, 3 + row, seed=row) for row in range(3)])
    ones = torch.ones(3, NEW_TOKENS, dtype=torch.long)
    whole = {
        "input_ids": torch.cat([found.sequences, more["input_ids"]], dim=1),
        "attention_mask": torch.cat([mask, ones, more["attention_mask"]], dim=1),
    }
    again = generate(model, joined, whole, **MODES[mode])
    alone = []
    for row, cache in enumerate(caches):
        answer = found.sequences[row : row + 1, -NEW_TOKENS:]
        ids = torch.cat([turns[row], answer, models.prompt_ids(1, 3 + row, seed=row)], dim=1)
        alone.append(generate(model, cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    assert_rows_are_as_alone(again, alone)


def test_prompts_below_the_budget_join_longer_ones():
    model = models.text_model()
    prompts = [models.prompt_ids(1, tokens, seed=tokens) for tokens in (40, 3, BUDGET, 9)]
    turns = [torch.cat([ids, models.prompt_ids(1, 4, seed=row)], dim=1) for row, ids in enumerate(prompts)]
    caches = [prefilled(model, ids) for ids in prompts]
    joined = join(caches)
    assert joined.kept_indices(0)[2, 0].tolist() == list(range(24, 40))
    found = generate(model, joined, left_padded(turns))
    assert_rows_are_as_alone(found, [generate(model, *pair) for pair in zip(caches, turns, strict=True)])


def test_batches_and_joined_caches_join():
    model = models.text_model()
    pair = models.left_padded([30, 12])
    cache = ShiftKVCache(model, budget=BUDGET)
    positions = (pair["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        model(**pair, position_ids=positions, **{CACHE_ARGUMENT: cache}, use_cache=True)
    single = prefilled(model, models.prompt_ids(1, 50))
    joined = join([join([single, cache]), single])
    rows = [models.prompt_ids(1, 50), pair["input_ids"][:1], pair["input_ids"][1:, 18:], models.prompt_ids(1, 50)]
    turns = [torch.cat([ids, models.prompt_ids(1, 4, seed=7)], dim=1) for ids in rows]
    found = generate(model, joined, left_padded(turns))
    alone = [generate(model, prefilled(model, ids), turn) for ids, turn in zip(rows, turns, strict=True)]
    assert_rows_are_as_alone(found, alone)
    assert found.logits[0][0].equal(found.logits[0][3])


def test_sixty_four_prompts():
    model = models.text_model(num_hidden_layers=2)
    prompts = [models.prompt_ids(1, 20 + row, seed=row) for row in range(64)]
    turns = [torch.cat([ids, models.prompt_ids(1, 2, seed=row)], dim=1) for row, ids in enumerate(prompts)]
    caches = [prefilled(model, ids) for ids in prompts]
    found = generate(model, join(caches, max_new_tokens=10), left_padded(turns), custom_generate=decode_ahead)
    assert_rows_are_as_alone(found, [generate(model, *pair) for pair in zip(caches, turns, strict=True)])


def test_the_joined_ones_stay_as_they_are():
    model = models.text_model()
    caches = [
        prefilled(model, models.prompt_ids(1, tokens), max_new_tokens=room) for tokens, room in ((40, 5), (30, 7))
    ]
    before = [(cache.layers[1].keys.clone(), str(cache.report())) for cache in caches]
    joined = join(caches, max_new_tokens=9)
    ids = left_padded([models.prompt_ids(1, 44), models.prompt_ids(1, 34)])
    generate(model, joined, ids)
    assert all(
        cache.layers[1].keys.equal(keys) and str(cache.report()) == report
        for cache, (keys, report) in zip(caches, before, strict=True)
    )
    joined.reset()
    assert generate(model, joined, models.prompt_ids()).sequences.shape == (1, 40 + NEW_TOKENS)
    assert joined.config == caches[0].config.replace(max_new_tokens=9)


def test_one_compilation_serves_batches_of_one_size():
    torch._dynamo.reset()
    counters.clear()
    model = models.text_model()
    for seed in range(3):
        prompts = [models.prompt_ids(1, tokens + seed, seed=seed) for tokens in LENGTHS]
        turns = [torch.cat([ids, models.prompt_ids(1, 4)], dim=1) for ids in prompts]
        joined = join([prefilled(model, ids) for ids in prompts], max_new_tokens=30)
        generate(model, joined, left_padded(turns), compile_config=compiling())
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna", "mistral"])
def test_images_of_different_sizes(vision_case, family):
    case = vision_case(family)
    model = case.model
    rows = [("What is the Total?", document_image(224, 168)), ("Read line 1.", document_image(140, 280))]
    prompts = [case.inputs(row) for row in rows]
    caches, deltas, alone = [], [], []
    for inputs in prompts:
        cache = ShiftKVCache(model, budget=20)
        with torch.no_grad():
            model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)
        caches.append(cache)
        deltas.append(offsets_of(model))
    question = models.prompt_ids(1, 5)
    turns = [torch.cat([inputs["input_ids"], question], dim=1) for inputs in prompts]
    joined = join(caches)
    for cache, delta, ids in zip(caches, deltas, turns, strict=True):
        put_back(model, delta)
        alone.append(generate(model, cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    put_back(model, joined_offsets(deltas))
    assert_rows_are_as_alone(generate(model, joined, left_padded(turns)), alone)


class TestRefused:
    def test_what_is_none(self):
        model = models.text_model()
        with pytest.raises(ValueError, match="caches is empty"):
            join([])
        with pytest.raises(TypeError, match=r"caches\[1\] is a NoneType"):
            join([prefilled(model, models.prompt_ids()), None])
        with pytest.raises(ValueError, match="holds no complete prompt"):
            join([ShiftKVCache(model, budget=BUDGET)])
        with pytest.raises(TypeError, match="max_new_tokens='9'"):
            join([prefilled(model, models.prompt_ids())], max_new_tokens="9")

    def test_other_classes_and_models(self):
        model, ids = models.text_model(), models.prompt_ids()
        other = SnapKVCache(model, BUDGET, window=4)
        generate(model, other, ids)
        with pytest.raises(ValueError, match=r"caches\[1\] is a SnapKVCache, caches\[0\] a ShiftKVCache"):
            join([prefilled(model, ids), other])
        with pytest.raises(ValueError, match=r"caches\[1\] was built for another model"):
            join([prefilled(model, ids), prefilled(models.text_model(), ids)])

    def test_compressed_caches_of_different_sizes(self):
        model, ids = models.text_model(), models.prompt_ids()
        with pytest.raises(ValueError, match=r"caches\[0\] holds 16 tokens of 40, another holds 17"):
            join([prefilled(model, ids), prefilled(model, ids, budget=17)])
        with pytest.raises(ValueError, match=r"caches\[1\] holds 16 tokens of 60, another holds 40"):
            join([prefilled(model, ids, budget=64), prefilled(model, models.prompt_ids(1, 60))])
