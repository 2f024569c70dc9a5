"""Decoding block by block: one compiled function for all blocks of a kind, and the tokens of `decode_ahead`."""

import gc
import weakref
from functools import partial
from threading import Thread

import pytest
import torch
from by_blocks import ByBlocks
from test_loop import EndsAt
from torch._dynamo.utils import counters
from transformers import StoppingCriteriaList, TextStreamer

import models
from compiling import graphs
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, decode_ahead

NEW_TOKENS = 10
WHOLE = {"custom_generate": decode_ahead}
# Kinds of blocks: those of full attention, of a window, of linear attention or of convolution; without rotation.
KINDS = {
    "llama": 1,
    "qwen3": 1,
    "mixtral": 1,
    "smollm3": 2,
    "gemma3_text": 2,
    "gpt_oss": 2,
    "lfm2": 2,
    "qwen3_5_text": 2,
    "qwen3_next": 2,
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(name):
    return models.text_model(name, **models.HYBRIDS.get(name, models.SUPPORTED.get(name)))


def answer(model, inputs, way, *, budget=9, room=NEW_TOKENS, cache=None, **options):
    torch.manual_seed(1)
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    cache = cache or ShiftKVCache(model, budget=budget, max_new_tokens=room)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, **options, **way}
    found = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, return_dict_in_generate=True, **options)
    return found, cache


def assert_same(found, expected):
    assert found[0].sequences.equal(expected[0].sequences)
    for one, other in zip(found[0].logits, expected[0].logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert int(found[1].get_seq_length()) == int(expected[1].get_seq_length())
    assert found[1].report().tokens_stored == expected[1].report().tokens_stored


@pytest.mark.parametrize("name", KINDS)
def test_one_graph_for_each_kind_of_block_serves_all_prompts_and_caches(name):
    model = build(name)
    blocks = ByBlocks(model)
    for tokens in (40, 3, 120, 20):
        inputs = models.prompt_ids(1, tokens, seed=tokens)
        assert_same(answer(model, inputs, blocks.options), answer(model, inputs, WHOLE))
        assert graphs() == KINDS[name]
    assert not counters["graph_break"]


def test_one_storage_and_one_recording_serve_all_caches(no_garbage_collection):
    model, places = build("gemma3_text"), set()
    blocks = ByBlocks(model)
    for tokens in (40, 3, 60):
        _, cache = answer(model, models.prompt_ids(1, tokens), blocks.options, min_new_tokens=NEW_TOKENS)
        places.add(tuple(layer.keys.data_ptr() for layer in cache.layers))
        del cache, _
    assert len(places) == len(blocks.decoding.recorder) == 1
    beside = answer(model, models.prompt_ids(), blocks.options)
    assert_same(answer(model, models.prompt_ids(), blocks.options), beside)
    assert len(blocks.decoding.recorder) == 2  # that of a cache beside another one


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna"])
def test_image_prompts(vision_case, family, rows):
    case = vision_case(family)
    inputs, blocks = case.prompts(rows), ByBlocks(case.model)
    for _ in range(2):
        found = answer(case.model, inputs, blocks.options, budget=24)
        assert_same(found, answer(case.model, inputs, WHOLE, budget=24))
    assert graphs() == 1


def test_images_of_other_prompts_need_no_other_recording(vision_case, no_garbage_collection):
    case = vision_case("qwen2_5_vl")
    blocks = ByBlocks(case.model)
    for height in (140, 168, 224):
        inputs = case.inputs(("What is the Total?", models.document_image(height, 280)))
        _, cache = answer(case.model, inputs, blocks.options, budget=24)
        del cache, _
    assert len(blocks.decoding.recorder) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["sampling", "several sequences", "processors"],
)
def test_ways_to_choose_a_token(options):
    model = build("llama")
    inputs, blocks = models.left_padded([40, 17]), ByBlocks(model)
    assert_same(answer(model, inputs, blocks.options, **options), answer(model, inputs, WHOLE, **options))


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_the_end_may_come_at_any_token_and_a_turn_behind_it(name):
    model = build(name)
    blocks = ByBlocks(model)
    for count in (1, 2, 5):
        criteria = StoppingCriteriaList([EndsAt(40 + count)])
        answers = [
            answer(model, models.prompt_ids(), way, stopping_criteria=criteria, room=30)
            for way in (blocks.options, WHOLE)
        ]
        assert_same(*answers)
        turn = torch.cat([answers[0][0].sequences, models.prompt_ids(1, 5, seed=3)], dim=1)
        ways = (blocks.options, WHOLE)
        assert_same(*(answer(model, turn, way, cache=one[1]) for way, one in zip(ways, answers, strict=True)))
    assert graphs() == KINDS[name]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_storage_that_moves_in_the_middle_of_an_answer(name):
    """Selected layers to larger storage, windows to the front of theirs."""
    model = build(name)
    found, expected = (
        answer(model, models.left_padded([40, 17]), way, room=3, max_new_tokens=80, min_new_tokens=80)
        for way in (ByBlocks(model).options, WHOLE)
    )
    assert_same(found, expected)
    assert graphs() == KINDS[name] + 1  # the second of full attention with any number of slots


def test_a_streamer_gets_all_tokens(vision_case, capsys):
    case = vision_case("qwen2_5_vl")
    texts = []
    for way in (ByBlocks(case.model).options, WHOLE):
        streamer = TextStreamer(case.processor.tokenizer, skip_prompt=True)
        answer(case.model, case.prompts(), way, budget=24, streamer=streamer)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def state_of(model):
    """All that modules hold, by identity, and what is in the dicts among it."""
    return [
        {name: [*value.items()] if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]


def test_the_model_is_left_as_it_was(vision_case):
    model = vision_case("qwen2_5_vl").model
    inputs = vision_case("qwen2_5_vl").prompts()
    answer(model, inputs, WHOLE, budget=24)
    before = state_of(model)
    answer(model, inputs, ByBlocks(model).options, budget=24)
    for old, new in zip(before, state_of(model), strict=True):
        assert old.keys() == new.keys()
        assert all(old[name] is new[name] or old[name] == new[name] for name in old if name != "rope_deltas")


def test_models_and_threads_side_by_side():
    both = [build("llama"), models.text_model(seed=1)]
    blocks = [ByBlocks(model) for model in both]
    inputs = [models.prompt_ids(1, 30, seed=number) for number in range(4)]
    expected = [answer(both[number % 2], ids, WHOLE) for number, ids in enumerate(inputs)]
    found = {}

    def run(number):
        found[number] = answer(both[number % 2], inputs[number], blocks[number % 2].options)

    run(0)
    run(1)
    threads = [Thread(target=run, args=(number,)) for number in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, each in enumerate(expected):
        assert_same(found[number], each)


def test_a_prefill_under_way_elsewhere_is_neither_seen_nor_disturbed():
    model = build("llama")
    expected = answer(model, models.prompt_ids(), WHOLE)
    blocks = ByBlocks(model)
    first = answer(model, models.prompt_ids(), blocks.options)
    other = ShiftKVCache(model, budget=9)
    thread = Thread(target=other.begin_pass, args=(40,))
    thread.start()
    thread.join()
    hooks = models.hooks_on(model)
    assert hooks
    assert_same(first, expected)
    assert_same(answer(model, models.prompt_ids(), blocks.options), expected)
    assert models.hooks_on(model) == hooks
    assert graphs() == 1


def test_weights_and_settings_that_change_are_seen():
    model = build("llama")
    blocks = ByBlocks(model)
    answer(model, models.prompt_ids(), blocks.options)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 64).eval()
    model.model.layers[2].self_attn.scaling = 0.5
    inputs = models.prompt_ids(1, 21)
    assert_same(answer(model, inputs, blocks.options), answer(model, inputs, WHOLE))


def test_what_is_compiled_goes_with_the_model():
    from mmshiftkv.decode import block_step

    model = build("llama")
    block_step.decoding_of(model)
    answer(model, models.prompt_ids(), {"custom_generate": partial(decode_by_its_own, block_step.decoding_of(model))})
    gone = weakref.ref(model), weakref.ref(block_step.decoding_of(model))
    del model
    torch._dynamo.reset()
    gc.collect()
    assert [each() for each in gone] == [None, None]


def decode_by_its_own(decoding, *args, **kwargs):
    from mmshiftkv.decode.block_step import BlockStep
    from mmshiftkv.decode.loop import decode_with

    decoding.programs._backend = lambda graph_module, inputs: graph_module
    return decode_with(lambda model, inputs, cache, *_: BlockStep(model, inputs, cache, decoding), *args, **kwargs)
