"""Counting values, through the cache; test_shiftkv.py has the whole method against its float64 statement."""

import copy

import pytest
import torch
from transformers import DynamicCache

import models
from masked_reference import dropped_entries_masked
from mmshiftkv import ShiftKVCache

FAMILIES = ("qwen2_5_vl", "vicuna", "mistral")
TEXT_MODELS = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa-head_dim": ("llama", {"num_key_value_heads": 1, "head_dim": 40}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
LENGTHS = [40, 23, 7]
NEW_TOKENS = 6


def text_model(name="llama"):
    model_type, changes = TEXT_MODELS[name]
    return models.text_model(model_type, **changes)


def values_cache(model, budget=9, **settings):
    return ShiftKVCache(model, budget=budget, preset="value-aware", **settings)


def prefilled(model, cache, inputs):
    if "attention_mask" in inputs and "pixel_values" not in inputs:
        # As `generate` counts them.
        inputs = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache


def full_cache(model, inputs):
    return prefilled(model, DynamicCache(config=model.config), inputs)


def generate(model, inputs, cache, **options):
    return model.generate(
        **inputs,
        past_key_values=cache,
        **{
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            **options,
        },
    )


def assert_close(one, other, tolerance=2e-4):
    assert one.sequences.equal(other.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), atol=tolerance, rtol=tolerance)


def stored_prompt(cache, layer):
    """Keys and values that are stored of the prompt."""
    held, count = cache.layers[layer], cache.kept_indices(layer).shape[-1]
    return held.keys[:, :, :count], held.values[:, :, :count]


def taken(states, kept):
    return states.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))


def assert_same_prompt(one, other, tolerance=None):
    """Both keep the same columns, and store the same of them: to the bit, or up to rounding."""
    for layer in range(len(one.layers)):
        assert one.kept_indices(layer).equal(other.kept_indices(layer)), f"layer {layer}"
        for mine, theirs in zip(stored_prompt(one, layer), stored_prompt(other, layer), strict=True):
            if tolerance is None:
                assert mine.equal(theirs), f"layer {layer}"
            else:
                torch.testing.assert_close(mine, theirs, atol=tolerance * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", [*TEXT_MODELS, *FAMILIES])
def test_a_covering_budget_is_stored_whole_and_generates_as_a_dynamic_cache(name, vision_case):
    if name in FAMILIES:
        case = vision_case(name)
        model, inputs = case.model, case.prompts(2)
    else:
        model, inputs = text_model(name), models.left_padded(LENGTHS)
    expected = generate(model, inputs, DynamicCache(config=model.config))
    width = inputs["input_ids"].shape[1]
    for budget in (1.0, width, width + 7):
        cache = values_cache(model, budget)
        found = generate(model, inputs, cache)
        assert found.sequences.equal(expected.sequences)
        assert all(mine.equal(theirs) for mine, theirs in zip(found.logits, expected.logits, strict=True))
        assert cache.kept_indices(0).shape[-1] == width
        assert cache.report().tokens_stored == cache.report().tokens_seen == width + NEW_TOKENS - 1


@pytest.mark.parametrize("settings", [{"score": "values"}, {"score": "values", "last_query_weight": 4.0}])
@pytest.mark.parametrize("name", [*TEXT_MODELS, "qwen2_5_vl", "vicuna"])
def test_without_a_refit_generation_is_that_of_the_masked_full_cache(name, settings, vision_case):
    if name in FAMILIES:
        case = vision_case(name)
        model, inputs = case.model, case.prompts(2)
    else:
        model, inputs = text_model(name), models.left_padded(LENGTHS)
    cache = ShiftKVCache(model, budget=0.3, **settings)
    found = generate(model, inputs, cache)
    kept = {layer: cache.kept_indices(layer) for layer in range(len(cache.layers))}
    with dropped_entries_masked(model, kept, inputs["attention_mask"].bool()):
        expected = generate(model, inputs, DynamicCache(config=model.config))
    assert_close(found, expected)


@pytest.mark.parametrize("score", ["values", "votes"])
@pytest.mark.parametrize("name", [*TEXT_MODELS, "qwen2_5_vl", "vicuna"])
def test_a_refit_changes_the_values_of_the_kept_tokens_and_nothing_else(name, score, vision_case):
    if name in FAMILIES:
        case = vision_case(name)
        model, inputs = case.model, case.prompts(2)
    else:
        model, inputs = text_model(name), models.left_padded(LENGTHS)
    plain = prefilled(model, values_cache(model, score=score, refit_queries=0), inputs)
    refitted = prefilled(model, values_cache(model, score=score), inputs)
    full = full_cache(model, inputs)
    valid, changes = inputs["attention_mask"].bool(), 0
    for layer, held in enumerate(full.layers):
        kept = plain.kept_indices(layer)
        assert refitted.kept_indices(layer).equal(kept)
        keys, values = stored_prompt(refitted, layer)
        # Without a refit what is stored is what there was, to the bit.
        for mine, theirs in zip(stored_prompt(plain, layer), (held.keys, held.values), strict=True):
            assert mine.equal(taken(theirs, kept))
        assert keys.equal(taken(held.keys, kept))
        is_token = valid[:, None].expand(-1, kept.shape[1], -1).gather(2, kept)
        changed = (values - taken(held.values, kept)).abs().amax(dim=-1)
        assert not changed[~is_token].any()
        assert changed.isfinite().all()
        # A head with an attention sink keeps its values, and a token that gets next to none of the attention its own.
        has_sink = (changed == 0).all(dim=-1, keepdim=True).expand_as(changed)
        assert (changed[is_token & ~has_sink] > 0).float().mean() > 0.8
        changes += int((~has_sink).sum())
    assert changes


@pytest.mark.parametrize("budget", [1, 6, 13, 25])
def test_a_row_keeps_and_stores_what_it_does_alone(budget):
    model, lengths = models.text_model("qwen3"), [30, 13, 4]
    inputs = models.left_padded(lengths)
    together = prefilled(model, values_cache(model, budget), inputs)
    for row, length in enumerate(lengths):
        padding = 30 - length
        own = {"input_ids": inputs["input_ids"][row : row + 1, padding:]}
        alone = prefilled(model, values_cache(model, budget), own)
        for layer in range(3):
            kept, expected = together.kept_indices(layer)[row], alone.kept_indices(layer)[0]
            tokens = expected.shape[-1]
            assert kept[:, -tokens:].sub(padding).equal(expected)
            for mine, theirs in zip(stored_prompt(together, layer), stored_prompt(alone, layer), strict=True):
                torch.testing.assert_close(mine[row, :, -tokens:], theirs[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 39, 40])
@pytest.mark.parametrize("settings", [{}, {"stats_window": 9}, {"last_token_layers": 1}])
def test_chunks_keep_and_store_what_a_single_pass_does(chunk, settings):
    model, inputs = text_model("qwen2"), models.left_padded(LENGTHS)
    single, cache = values_cache(model, **settings), values_cache(model, **settings)
    expected = generate(model, inputs, single)
    found = generate(model, inputs, cache, prefill_chunk_size=chunk)
    assert_same_prompt(cache, single, tolerance=1e-3)
    assert_close(found, expected, tolerance=2e-3)


@pytest.mark.parametrize("family", ["vicuna", "qwen2_5_vl"])
def test_images_in_chunks(family, vision_case):
    case = vision_case(family)
    inputs, single, cache = case.prompts(1), values_cache(case.model, 20), values_cache(case.model, 20)
    expected = generate(case.model, inputs, single)
    found = generate(case.model, inputs, cache, prefill_chunk_size=30)
    assert_same_prompt(cache, single, tolerance=1e-3)
    assert found.sequences.equal(expected.sequences)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("refit_queries", [0, 512])
def test_beams_and_sequences_carry_the_stored_prompt_along(options, refit_queries):
    model, inputs = text_model(), models.left_padded([30, 21])
    found, caches = [], [values_cache(model, refit_queries=refit_queries, max_new_tokens=room) for room in (None, 10)]
    for cache in caches:
        torch.manual_seed(3)
        found.append(generate(model, inputs, cache, **options))
    assert found[0].sequences.equal(found[1].sequences)
    single = prefilled(model, values_cache(model, refit_queries=refit_queries), inputs)
    for cache in caches:
        for layer in range(3):
            expected = [*stored_prompt(single, layer), single.kept_indices(layer)]
            for mine, theirs in zip([*stored_prompt(cache, layer), cache.kept_indices(layer)], expected, strict=True):
                assert mine.equal(theirs.repeat_interleave(3, dim=0))
    if not refit_queries:
        kept = {layer: caches[0].kept_indices(layer) for layer in range(3)}
        with dropped_entries_masked(model, kept, inputs["attention_mask"].bool().repeat_interleave(3, dim=0)):
            torch.manual_seed(3)
            expected = generate(model, inputs, DynamicCache(config=model.config), **options)
        assert found[0].sequences.equal(expected.sequences)


@pytest.mark.parametrize("name", ["llama", "llama-mha", "llama-mqa-head_dim"])
@pytest.mark.parametrize("budget", [1, 9, 0.5, 39])
def test_fixed_storage_gives_the_tokens_of_storage_that_grows(name, budget):
    model, inputs = text_model(name), models.left_padded(LENGTHS)
    growing, fixed = (values_cache(model, budget, max_new_tokens=room) for room in (None, NEW_TOKENS))
    assert_close(generate(model, inputs, growing), generate(model, inputs, fixed))
    assert_same_prompt(fixed, growing)
    kept = 20 if budget == 0.5 else budget
    assert growing.report().tokens_stored == fixed.report().tokens_stored == kept + NEW_TOKENS - 1


@pytest.mark.parametrize("reserved", [None, 40])
def test_a_second_turn_goes_on_with_what_is_stored(reserved):
    model, inputs = text_model(), {"input_ids": models.prompt_ids(2)}
    cache, other = (values_cache(model, max_new_tokens=room) for room in (reserved, None))
    answers = [generate(model, inputs, each).sequences for each in (cache, other)]
    assert answers[0].equal(answers[1])
    conversation = torch.cat([answers[0], models.prompt_ids(2, 5, seed=1)], dim=1)
    before = [[part.clone() for part in stored_prompt(cache, layer)] for layer in range(3)]
    turns = [generate(model, {"input_ids": conversation}, each) for each in (cache, other)]
    assert_close(*turns)
    for layer in range(3):
        for mine, theirs in zip(stored_prompt(cache, layer), before[layer], strict=True):
            assert mine.equal(theirs)
    assert cache.report().tokens_stored == 9 + turns[0].sequences.shape[1] - 1 - 40


@pytest.mark.parametrize("reserved", [None, 40])
def test_a_copy_goes_on_as_the_original_would_have(reserved):
    model, inputs = text_model(), models.left_padded(LENGTHS)
    cache = prefilled(model, values_cache(model, max_new_tokens=reserved), inputs)
    twin = copy.deepcopy(cache)
    assert_same_prompt(twin, cache)
    token = models.prompt_ids(3, 1, seed=4)
    with torch.no_grad():
        logits = [model(token, past_key_values=each, use_cache=True).logits for each in (twin, cache)]
    assert logits[0].equal(logits[1])


@pytest.mark.parametrize("reserved", [None, 40])
def test_after_a_reset_a_prompt_is_like_the_first(reserved):
    model, inputs = text_model(), models.left_padded(LENGTHS)
    expected = values_cache(model)
    tokens = generate(model, inputs, expected).sequences
    cache = values_cache(model, max_new_tokens=reserved)
    generate(model, {"input_ids": models.prompt_ids(2, 33, seed=8)}, cache)
    cache.reset()
    assert cache.kept_indices(0) is None
    assert generate(model, inputs, cache).sequences.equal(tokens)
    assert_same_prompt(cache, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reserved", [None, NEW_TOKENS])
def test_half_precision(dtype, reserved):
    model, inputs = text_model("llama-mqa-head_dim").to(dtype), models.left_padded(LENGTHS)
    cache = values_cache(model, max_new_tokens=reserved)
    found = generate(model, inputs, cache)
    assert torch.stack(found.logits).isfinite().all()
    for layer in range(3):
        for part in stored_prompt(cache, layer):
            assert part.dtype == dtype
            assert part.isfinite().all()


@pytest.mark.parametrize("reserved", [None, NEW_TOKENS])
@pytest.mark.parametrize("score", ["values", "votes"])
def test_under_autocast_values_have_another_dtype_than_keys_and_keep_it(score, reserved):
    model, inputs = text_model("qwen2"), models.left_padded(LENGTHS)
    cache = values_cache(model, score=score, max_new_tokens=reserved)
    with torch.autocast("cpu", torch.bfloat16):
        full, found = full_cache(model, inputs), generate(model, inputs, cache)
    assert (full.layers[0].keys.dtype, full.layers[0].values.dtype) == (torch.float32, torch.bfloat16)
    assert torch.stack(found.logits).isfinite().all()
    for layer in range(3):
        keys, values = stored_prompt(cache, layer)
        assert (keys.dtype, values.dtype) == (torch.float32, torch.bfloat16)
        assert keys.equal(taken(full.layers[layer].keys, cache.kept_indices(layer)))
        assert values.isfinite().all()


def test_a_seed_repeats_and_torchs_random_state_is_left_alone(vision_case):
    case = vision_case("qwen2_5_vl")
    inputs = case.prompts(2)
    state = torch.get_rng_state()
    first, second = (prefilled(case.model, values_cache(case.model, 20), inputs) for _ in range(2))
    assert torch.get_rng_state().equal(state)
    assert_same_prompt(first, second)
    other = prefilled(case.model, values_cache(case.model, 20, seed=1), inputs)
    stored = [[stored_prompt(cache, layer)[1] for layer in range(len(cache.layers))] for cache in (first, other)]
    assert not all(mine.equal(theirs) for mine, theirs in zip(*stored, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_refit_brings_the_next_token_nearer_to_the_full_cache(model_type):
    """Its queries are none of the proxies: the models' weights are random, and so it need not be so in each layer."""
    model, nearer = models.text_model(model_type, initializer_range=0.06), []
    for seed in range(4):
        inputs, token = {"input_ids": models.prompt_ids(4, 40, seed=seed)}, models.prompt_ids(4, 1, seed=99)
        caches = [full_cache(model, inputs), *(values_cache(model, 6, refit_queries=n) for n in (0, 512))]
        for cache in caches[1:]:
            prefilled(model, cache, inputs)
        with torch.no_grad():
            full, plain, refitted = (model(token, past_key_values=each, use_cache=True).logits for each in caches)
        nearer.append((refitted - full).norm() / (plain - full).norm())
    assert sum(nearer) / 4 < 0.9, nearer
