"""What a cache learns from `generate`: where a prompt ends, and whether a turn goes on with it."""

import copy

import pytest
import torch
from transformers import DynamicCache

import models
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, decode_ahead
from mmshiftkv.model.generation import generate_call, is_compiling_prefill

OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.fixture
def model():
    return models.text_model()


def calls_of(model, cache, ids, **options):
    """What the cache could learn in each forward pass of `generate`."""
    calls = []
    kind = type(cache)

    class Watched(kind):
        def begin_pass(self, tokens):
            calls.append((tokens, generate_call(self)))
            super().begin_pass(tokens)

    cache.__class__ = Watched
    model.generate(ids, **{CACHE_ARGUMENT: cache}, **OPTIONS, **options)
    return calls


def test_a_plain_prefill_names_its_ids_and_its_length(model):
    ids = models.prompt_ids()
    tokens, call = calls_of(model, ShiftKVCache(model, budget=4), ids)[0]
    assert (tokens, call.prompt, call.columns) == (40, None, 40)
    assert call.ids.equal(ids)


def test_chunks_name_the_length_of_the_prompt(model):
    calls = calls_of(model, ShiftKVCache(model, budget=4), models.prompt_ids(), prefill_chunk_size=39)
    chunks = list(dict.fromkeys((tokens, call.prompt) for tokens, call in calls if call is not None))
    assert chunks == [(39, 40), (1, 40)]


def test_candidates_are_no_part_of_the_prompt(model):
    ids = models.prompt_ids(1, 10).repeat(1, 4)
    (tokens, call), *later = calls_of(model, ShiftKVCache(model, budget=4), ids, prompt_lookup_num_tokens=3)
    assert (tokens, call.prompt, call.columns) == (43, 40, 43)
    assert later[-1][1] is None  # a later verification is no prefill


def test_decoding_steps_belong_to_no_prefill(model):
    calls = calls_of(model, ShiftKVCache(model, budget=4), models.prompt_ids())
    assert {call for tokens, call in calls if tokens == 1} == {None}


def test_nothing_is_learned_of_another_cache_or_outside_of_generate(model):
    cache, other = ShiftKVCache(model, budget=4), ShiftKVCache(model, budget=4)
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(generate_call(other)))
    model.generate(models.prompt_ids(), **{CACHE_ARGUMENT: cache}, **OPTIONS)
    handle.remove()
    assert set(seen) == {None}
    assert generate_call(cache) is None
    assert not is_compiling_prefill()


@pytest.mark.parametrize(
    ("settings", "options"),
    [({}, {}), ({"max_new_tokens": 30}, {}), ({"max_new_tokens": 30}, {"custom_generate": decode_ahead})],
)
def test_another_prompt_on_a_used_cache_is_refused(model, settings, options):
    cache = ShiftKVCache(model, budget=4, **settings)
    output = model.generate(models.prompt_ids(), **{CACHE_ARGUMENT: cache}, **OPTIONS, **options)
    held = copy.deepcopy(cache)
    for tokens in (30, 60):
        with pytest.raises(ValueError, match=r"do not begin with the prompt of 40 columns.*reset\(\)"):
            model.generate(models.prompt_ids(1, tokens, seed=1), **{CACHE_ARGUMENT: cache}, **OPTIONS, **options)
    turn = torch.cat([output, models.prompt_ids(1, 3)], dim=1)
    found, expected = (model.generate(turn, **{CACHE_ARGUMENT: each}, **OPTIONS, **options) for each in (cache, held))
    assert found.equal(expected)
    cache.reset()
    model.generate(models.prompt_ids(1, 60, seed=1), **{CACHE_ARGUMENT: cache}, **OPTIONS, **options)
    assert cache.kept_indices(0)[0, 0, -1] == 59


@pytest.mark.parametrize("settings", [{}, {"max_new_tokens": 30}])
def test_a_changed_cache_takes_other_ids(model, settings):
    """The prompt that is left of a crop, and rows in another order, go on as they are now."""
    cache = ShiftKVCache(model, budget=100, **settings)
    model.generate(models.prompt_ids(), **{CACHE_ARGUMENT: cache}, **OPTIONS)
    cache.crop(30 - int(cache.get_seq_length()))
    turn = torch.cat([models.prompt_ids()[:, :30], models.prompt_ids(1, 15, seed=3)], dim=1)
    expected = model.generate(turn, **{CACHE_ARGUMENT: DynamicCache(config=model.config)}, **OPTIONS)
    assert model.generate(turn, **{CACHE_ARGUMENT: cache}, **OPTIONS).equal(expected)
    rows = models.prompt_ids(2)
    cache = ShiftKVCache(model, budget=100, **settings)
    output = model.generate(rows, **{CACHE_ARGUMENT: cache}, **OPTIONS)
    cache.reorder_cache(torch.tensor([1, 0]))
    turn = torch.cat([output.flip(0), models.prompt_ids(2, 3)], dim=1)
    expected = model.generate(turn, **{CACHE_ARGUMENT: DynamicCache(config=model.config)}, **OPTIONS)
    assert model.generate(turn, **{CACHE_ARGUMENT: cache}, **OPTIONS).equal(expected)


@pytest.mark.parametrize("settings", [{}, {"max_new_tokens": 30}])
def test_a_turn_in_chunks_goes_on_or_is_refused_where_it_is_fed_anew(model, settings):
    cache = ShiftKVCache(model, budget=4, **settings)
    output = model.generate(models.prompt_ids(), **{CACHE_ARGUMENT: cache}, **OPTIONS)
    plain, turn = copy.deepcopy(cache), torch.cat([output, models.prompt_ids(1, 9)], dim=1)
    expected = model.generate(turn, **{CACHE_ARGUMENT: plain}, **OPTIONS)
    found, refusal = None, ""
    try:
        found = model.generate(turn, **{CACHE_ARGUMENT: cache}, prefill_chunk_size=4, **OPTIONS)
    except ValueError as error:  # transformers 5.17
        refusal = str(error)
    if found is None:
        assert "feeds the whole conversation again" in refusal
        assert cache.get_seq_length() == 44
    else:
        assert found.equal(expected)


def test_input_without_anything_new_is_refused(model):
    cache = ShiftKVCache(model, budget=4)
    with torch.no_grad():
        model(models.prompt_ids(), **{CACHE_ARGUMENT: cache}, use_cache=True)
    with pytest.raises(ValueError, match=r"passes 40 tokens after 40, where 40 are to be seen.*nothing new"):
        model.generate(models.prompt_ids(), **{CACHE_ARGUMENT: cache}, **OPTIONS)
    assert cache.get_seq_length() == 40


def test_only_new_ids_with_the_whole_mask_are_a_turn(model):
    new = models.prompt_ids(1, 6, seed=2)
    answers = []
    for is_whole in (True, False):
        cache = ShiftKVCache(model, budget=4)
        output = model.generate(models.prompt_ids(), **{CACHE_ARGUMENT: cache}, **OPTIONS)
        whole = torch.cat([output, new], dim=1)
        ids = whole if is_whole else whole[:, cache.get_seq_length() :]
        mask = torch.ones_like(whole)
        answers.append(model.generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **OPTIONS)[:, -5:])
    assert answers[0].equal(answers[1])


def test_embeddings_are_prefilled_as_ids_are(model):
    ids = models.prompt_ids()
    caches = [ShiftKVCache(model, budget=4) for _ in range(2)]
    expected = model.generate(ids, **{CACHE_ARGUMENT: caches[0]}, **OPTIONS)[:, 40:]
    embeddings = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeddings, **{CACHE_ARGUMENT: caches[1]}, **OPTIONS)
    assert found.equal(expected)
    assert caches[0].kept_indices(1).equal(caches[1].kept_indices(1))


def test_beams_from_a_prompt_of_one_row(model):
    ids = models.prompt_ids()
    longer = torch.cat([ids, models.prompt_ids(1, 3, seed=2)], dim=1)
    expected = model.generate(longer, **{CACHE_ARGUMENT: ShiftKVCache(model, budget=100)}, num_beams=3, **OPTIONS)
    for settings in ({}, {"max_new_tokens": 12}):
        cache = ShiftKVCache(model, budget=100, **settings)
        with torch.no_grad():
            model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
        assert model.generate(longer, **{CACHE_ARGUMENT: cache}, num_beams=3, **OPTIONS).equal(expected)
        assert cache.kept_indices(0).shape[0] == 3


def test_a_full_cache_and_beams_agree(model):
    ids = models.prompt_ids()
    full, covering = DynamicCache(config=model.config), ShiftKVCache(model, budget=40)
    found, expected = (
        model.generate(ids, **{CACHE_ARGUMENT: cache}, num_beams=3, **OPTIONS) for cache in (covering, full)
    )
    assert found.equal(expected)
