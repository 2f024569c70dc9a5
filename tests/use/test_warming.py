"""`warm_up` leaves nothing of its prompt, and the next cache finds what it needs."""

import logging

import pytest
import torch

import models
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, decode_ahead, warm_up
from mmshiftkv.storage import buffers


def answer(model, inputs, cache):
    options = {"max_new_tokens": 6, "do_sample": False, "custom_generate": decode_ahead}
    return model.generate(**inputs, **{CACHE_ARGUMENT: cache}, **options)


@pytest.mark.parametrize("rows", [1, 3])
def test_answers_are_the_same_with_and_without(vision_case, rows):
    case = vision_case("qwen2_5_vl")
    inputs = case.prompts(rows)
    expected = answer(case.model, inputs, ShiftKVCache(case.model, budget=24, max_new_tokens=6))
    warm_up(case.model, 24, 6, batch_size=rows)
    assert answer(case.model, inputs, ShiftKVCache(case.model, budget=24, max_new_tokens=6)).equal(expected)


def test_the_next_cache_takes_its_storage_and_nothing_else_has_changed(vision_case, no_garbage_collection):
    case = vision_case("qwen2_5_vl")
    model = case.model
    answer(model, case.prompts(), ShiftKVCache(model, budget=24, max_new_tokens=6))
    offsets, state = model.model.rope_deltas, torch.get_rng_state()
    warm_up(model, 24, 6, preset="value-aware")
    assert model.model.rope_deltas is offsets
    assert torch.get_rng_state().equal(state)
    assert models.hooks_on(model) == 0
    _, waiting = buffers._unused[model.get_decoder().layers[0]]
    cache = ShiftKVCache(model, budget=24, max_new_tokens=6)
    answer(model, case.prompts(), cache)
    assert {id(layer.keys) for layer in cache.layers} <= set(map(id, waiting.values()))


def test_it_says_when_it_begins_and_when_it_is_done(caplog):
    with caplog.at_level(logging.INFO, logger="mmshiftkv"):
        warm_up(models.text_model(), 0.5, 3, method="snapkv", prompt_tokens=40, batch_size=2)
    first, last = (record.message for record in caplog.records)
    assert first == "warming up LlamaForCausalLM: batches of 2"
    assert last.startswith("warmed up LlamaForCausalLM in ")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"batch_size": 0}, "batch_size=0 must be an int >= 1"),
        ({"prompt_tokens": 0}, "prompt_tokens=0 must be an int >= 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an int >= 1"),
        ({"budget": 0}, "budget=0 must be an int >= 1"),
        ({"method": "none"}, "method='none' must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, error):
    with pytest.raises(ValueError, match=error):
        warm_up(models.text_model(), **{"budget": 5, "max_new_tokens": 4, **arguments})


@pytest.mark.filterwarnings("ignore:max_new_tokens")
def test_a_model_that_is_not_compiled_is_refused():
    model = models.text_model("llama4_text", **models.HYBRIDS["llama4_text"])
    with pytest.raises(ValueError, match="decoding of Llama4ForCausalLM with method='shiftkv' cannot be compiled"):
        warm_up(model, 5, 4)
