"""What may be around a cache: autocast, inference mode, a compiled model, training, pickle, other libraries' hands."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import models
from mmshiftkv import CACHE_ARGUMENT, ExpectedAttentionCache, ShiftKVCache, SnapKVCache

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
STORAGE = [{}, {"max_new_tokens": 30}]


@pytest.fixture
def model():
    return models.text_model()


def generate(model, ids, cache, **options):
    return model.generate(ids, **{CACHE_ARGUMENT: cache}, **OPTIONS, **options)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(
    ("make", "settings"), [(ShiftKVCache, {}), (SnapKVCache, {"window": 2}), (ExpectedAttentionCache, {})]
)
def test_autocast(model, storage, make, settings):
    for budget in (100, 6):
        built_outside = make(model, budget=budget, **storage, **settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = generate(model, models.prompt_ids(), DynamicCache(config=model.config))
            found = generate(model, models.prompt_ids(), built_outside)
            built_inside = make(models.text_model(), budget=budget, **storage, **settings)
            again = generate(model, models.prompt_ids(), make(model, budget=budget, **storage, **settings))
        assert again.equal(found)
        assert built_inside.get_seq_length() == 0
        if budget == 100 and not storage:
            assert found.equal(expected)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("budget", [6, 100])
def test_storage_made_under_inference_mode_is_written_outside(model, storage, budget):
    answers = []
    for mode in (True, False):
        cache = ShiftKVCache(model, budget=budget, **storage)
        with torch.inference_mode(mode):
            output = generate(model, models.prompt_ids(), cache)
        turn = torch.cat([output.clone(), models.prompt_ids(1, 4)], dim=1)
        cache.reorder_cache(torch.tensor([0]))
        answers.append(generate(model, turn, cache))
    assert answers[0].equal(answers[1])


@pytest.mark.parametrize("storage", STORAGE)
def test_a_model_that_its_user_compiled(storage):
    model = models.text_model(num_hidden_layers=2)
    expected = generate(model, models.prompt_ids(), ShiftKVCache(model, budget=6, **storage))
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    assert generate(model, models.prompt_ids(), ShiftKVCache(model, budget=6, **storage)).equal(expected)
    torch._dynamo.reset()


def test_gradient_checkpointing_leaves_no_hooks(model):
    model.train()
    model.gradient_checkpointing_enable()
    cache = ShiftKVCache(model, budget=4)
    before = models.hooks_on(model)
    model(models.prompt_ids(), **{CACHE_ARGUMENT: cache})
    assert models.hooks_on(model) == before
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("filled", [False, True])
def test_pickling_is_refused_and_copying_is_not(model, storage, filled):
    cache = ShiftKVCache(model, budget=4, **storage)
    if filled:
        generate(model, models.prompt_ids(), cache)
    with pytest.raises(TypeError, match=r"cannot be pickled; copy.deepcopy copies it"):
        pickle.dumps(cache)
    assert copy.deepcopy(cache).get_seq_length() == cache.get_seq_length()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(
    "rows", [(0, 2), [0, 2], torch.tensor([0, 2]), torch.tensor([True, False, True]), [True, False, True]], ids=str
)
def test_rows_are_chosen_in_every_way(model, storage, rows):
    cache, expected = (ShiftKVCache(model, budget=4, **storage) for _ in range(2))
    for each in (cache, expected):
        with torch.no_grad():
            model(models.prompt_ids(3), **{CACHE_ARGUMENT: each}, use_cache=True)
    cache.batch_select_indices(rows)
    for mine, theirs in zip(cache.layers, expected.layers, strict=True):
        assert mine.keys.equal(theirs.keys[[0, 2]])
        assert mine.kept_indices.equal(theirs.kept_indices[[0, 2]])


def test_keys_that_another_library_cut_off(model):
    """As kvpress does with the answer to each of several questions about one text."""
    ids, question = models.prompt_ids(), models.prompt_ids(1, 5, seed=1)
    logits = []
    for cache in (DynamicCache(config=model.config), ShiftKVCache(model, budget=100)):
        with torch.no_grad():
            model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
            for _ in range(2):
                found = model(question, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, :40], layer.values[:, :, :40]
                assert cache.get_seq_length() == 40
        logits.append(found)
    assert logits[0].equal(logits[1])


def test_a_ready_made_mask_does_when_the_budget_covers_the_prompt(model):
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    logits = []
    for cache in (DynamicCache(config=model.config), ShiftKVCache(model, budget=40)):
        with torch.no_grad():
            model(models.prompt_ids(), attention_mask=mask, **{CACHE_ARGUMENT: cache}, use_cache=True)
            logits.append(model(models.prompt_ids(1, 1), **{CACHE_ARGUMENT: cache}, use_cache=True).logits)
    assert logits[0].equal(logits[1])


def test_a_prefill_within_a_prefill_is_named_as_a_reason(model):
    cache = ShiftKVCache(model, budget=4)

    def prefill_another(*_):
        handle.remove()
        with torch.no_grad():
            model(models.prompt_ids(), **{CACHE_ARGUMENT: ShiftKVCache(model, budget=4)}, use_cache=True)

    handle = model.model.layers[1].register_forward_pre_hook(prefill_another)
    reason = "another prefill of the same model began before this one ended"
    with pytest.raises(ValueError, match=reason), torch.no_grad():
        model(models.prompt_ids(), **{CACHE_ARGUMENT: cache}, use_cache=True)
    assert models.hooks_on(model) == 0
