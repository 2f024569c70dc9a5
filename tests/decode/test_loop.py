"""`decode_ahead` gives what `generate` gives, and takes back what it ran too far."""

import gc
import logging
from threading import Thread

import pytest
import torch
from test_compiled import NEW_TOKENS
from torch._dynamo.utils import counters
from transformers import (
    DynamicCache,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import models
from compiling import compiling
from mmshiftkv import ShiftKVCache, decode_ahead

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "compiled": {"compile_config": compiling()},
}


def run(case, inputs, budget=20, room=NEW_TOKENS, **options):
    torch.manual_seed(1)
    cache = ShiftKVCache(case.model, budget=budget, max_new_tokens=room)
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        **options,
    }
    return case.model.generate(**inputs, past_key_values=cache, **options), cache


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "attention"), [("qwen2_5_vl", "sdpa"), ("qwen2_5_vl", "eager"), ("vicuna", "sdpa")])
def test_all_is_as_with_generate(vision_case, family, attention, mode, rows):
    case = vision_case(family, attention)
    inputs = case.prompts(rows)
    expected, theirs = run(case, inputs, **MODES[mode])
    found, mine = run(case, inputs, **MODES[mode], custom_generate=decode_ahead)
    assert found.sequences.equal(expected.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name])
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert mine.get_seq_length() == theirs.get_seq_length() == found.sequences.shape[1] - 1
    assert mine.report().tokens_stored == theirs.report().tokens_stored
    assert found.get("cache", found.get("past_key_values")) is mine


class EndsAt(StoppingCriteria):
    """Ends every row with its token number `count`."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.mark.parametrize("count", range(1, NEW_TOKENS + 1))
def test_the_end_may_come_at_any_token(count):
    model = models.text_model()
    inputs = {"input_ids": models.prompt_ids()}
    case = models.VisionCase(model, None)
    criteria = StoppingCriteriaList([EndsAt(40 + count), MaxTimeCriteria(600.0)])
    expected, theirs = run(case, inputs, stopping_criteria=criteria)
    found, mine = run(case, inputs, stopping_criteria=criteria, custom_generate=decode_ahead)
    assert found.sequences.shape == (1, 40 + count)
    assert found.sequences.equal(expected.sequences)
    assert len(found.scores) == len(found.logits) == count
    assert mine.get_seq_length() == theirs.get_seq_length()
    # The same conversation goes on from there.
    turn = torch.cat([found.sequences, models.prompt_ids(1, 5, seed=3)], dim=1)
    answers = [
        model.generate(turn, past_key_values=cache, max_new_tokens=6, do_sample=False) for cache in (theirs, mine)
    ]
    assert answers[0].equal(answers[1])


def test_the_end_may_come_with_the_last_slot():
    model = models.text_model()
    criteria = StoppingCriteriaList([EndsAt(40 + 5)])
    for options in ({}, {"custom_generate": decode_ahead}):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=4)
        found = model.generate(
            models.prompt_ids(), past_key_values=cache, max_new_tokens=30, stopping_criteria=criteria, **options
        )
        assert found.shape == (1, 45)
        assert cache.report().tokens_stored == 13


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_storage_may_be_moved_in_the_middle_of_a_later_answer(attention):
    model = models.text_model(attention=attention)
    answers = []
    for room, options in ((None, {}), (14, {}), (14, {"custom_generate": decode_ahead})):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=room)
        options = {"do_sample": False, **options}
        ids = model.generate(models.prompt_ids(), past_key_values=cache, max_new_tokens=3, **options)
        turn = torch.cat([ids, models.prompt_ids(1, 4, seed=5)], dim=1)
        answers.append(model.generate(turn, past_key_values=cache, max_new_tokens=25, min_new_tokens=25, **options))
    assert cache.layers[0].slots == 46
    assert answers[0].equal(answers[1])
    assert answers[0].equal(answers[2])


def test_one_compilation_and_one_storage_serve_all_prompts(no_garbage_collection):
    torch._dynamo.reset()
    counters.clear()
    model, places = models.text_model(), set()
    for index, tokens in enumerate((40, 3, 9, 10, 120, 41) * 3):
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "compile_config": compiling()}
        cache = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS)
        model.generate(models.prompt_ids(1, tokens), past_key_values=cache, custom_generate=decode_ahead, **options)
        places.add(tuple(layer.keys.data_ptr() for layer in cache.layers))
        del cache
        if index == 0:
            gc.collect()  # the tracer left the cache in a cycle
    assert len(places) == 1
    assert counters["stats"]["unique_graphs"] == 1


def test_a_later_turn_of_a_conversation():
    model = models.text_model()
    answers = []
    for options in ({}, {"custom_generate": decode_ahead}):
        cache, ids = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS), models.prompt_ids()
        for _ in range(3):
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
            ids = torch.cat([ids, models.prompt_ids(1, 7, seed=5)], dim=1)
        answers.append(ids)
    assert answers[0].equal(answers[1])


def test_a_streamer_gets_what_it_gets_of_generate(vision_case, capsys):
    case = vision_case("qwen2_5_vl")
    streamer = TextStreamer(case.processor.tokenizer, skip_prompt=True)
    run(case, case.prompts(), streamer=streamer)
    expected = capsys.readouterr().out
    run(case, case.prompts(), custom_generate=decode_ahead, streamer=streamer)
    assert capsys.readouterr().out == expected != ""


def test_an_iterating_streamer_comes_to_its_end(vision_case):
    case = vision_case("qwen2_5_vl")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    texts = []
    for own in ({}, {"custom_generate": decode_ahead}):
        streamer = TextIteratorStreamer(case.processor.tokenizer, skip_prompt=True, timeout=60)
        cache = ShiftKVCache(case.model, budget=20, max_new_tokens=NEW_TOKENS)
        given = {**case.prompts(), "past_key_values": cache, "streamer": streamer, **options, **own}
        thread = Thread(target=case.model.generate, kwargs=given)
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1] != ""


def test_only_the_sequences_unless_more_is_asked_for():
    model = models.text_model()
    cache = ShiftKVCache(model, budget=9, max_new_tokens=4)
    found = model.generate(models.prompt_ids(), past_key_values=cache, max_new_tokens=4, custom_generate=decode_ahead)
    assert isinstance(found, torch.Tensor)
    assert found.shape[1] <= 44


def test_more_tokens_than_reserved_move_to_larger_storage_as_with_generate(caplog):
    model = models.text_model()
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    expected = model.generate(models.prompt_ids(), past_key_values=ShiftKVCache(model, budget=9), **options)
    cache = ShiftKVCache(model, budget=9, max_new_tokens=4)
    with caplog.at_level(logging.WARNING, logger="mmshiftkv"):
        found = model.generate(models.prompt_ids(), past_key_values=cache, custom_generate=decode_ahead, **options)
    assert found.equal(expected)
    assert [record.message for record in caplog.records] == [
        "more tokens than max_new_tokens=4: the cache moves to storage of 26 slots, decoding is compiled again"
    ]


def test_a_last_step_that_is_taken_back_moves_nothing(caplog):
    model = models.text_model()
    options = {"do_sample": False, "custom_generate": decode_ahead}
    for end in range(1, 6):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=4)
        with caplog.at_level(logging.WARNING, logger="mmshiftkv"):
            model.generate(models.prompt_ids(), past_key_values=cache, max_new_tokens=end, **options)
    assert not caplog.records


@pytest.mark.parametrize(
    "make_cache", [lambda model: DynamicCache(config=model.config), lambda model: ShiftKVCache(model, budget=9)]
)
def test_a_cache_that_cannot_be_compiled_is_refused(make_cache):
    model = models.text_model()
    with pytest.raises(ValueError, match="decode_ahead needs a cache of mmshiftkv that was built with max_new_tokens"):
        model.generate(models.prompt_ids(), past_key_values=make_cache(model), custom_generate=decode_ahead)


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"output_attentions": True, "return_dict_in_generate": True}])
def test_what_it_does_not_do_is_refused(option):
    model = models.text_model(attention="eager")
    cache = ShiftKVCache(model, budget=9, max_new_tokens=4)
    with pytest.raises(ValueError, match=f"does not take {next(iter(option))}"):
        model.generate(models.prompt_ids(), past_key_values=cache, custom_generate=decode_ahead, **option)
    assert cache.get_seq_length() == 0
