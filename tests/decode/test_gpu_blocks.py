"""Decoding block by block on a CUDA device, compiled and recorded; skipped where there is none."""

import gc
import weakref
from threading import Thread

import pytest
import torch
from test_gpu_decoding import AHEAD, as_long_as_equal
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import models
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, decode_ahead, warm_up
from mmshiftkv.decode.block_step import decoding_of
from test_exactness import NEW_TOKENS, generate
from test_gpu import on_gpu

pytestmark = [pytest.mark.gpu, models.requires_gpu]
# By name, their kinds of blocks.
FAMILIES = {name: 1 for name in models.SUPPORTED if name not in ("llama-dynamic", "llama-longrope")}
FAMILIES |= {"smollm3": 2}
FAMILIES |= {name: 2 for name in models.HYBRIDS if name not in ("gemma4_text", "llama4_text")}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def build(name, dtype=torch.float32):
    changes = models.HYBRIDS.get(name, models.SUPPORTED.get(name))
    return models.text_model(name.split("-")[0], **changes).to("cuda", dtype)


def answer(model, inputs, way=AHEAD, **options):
    cache = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS)
    return generate(model, inputs, cache, min_new_tokens=NEW_TOKENS, **way, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_for_each_kind_and_one_recording_serve_all_caches(name):
    model = build(name)
    for index, tokens in enumerate((40, 5, 60)):
        inputs = {"input_ids": models.prompt_ids(1, tokens, seed=index).cuda()}
        expected = generate(model, inputs, ShiftKVCache(model, budget=9), min_new_tokens=NEW_TOKENS)
        assert as_long_as_equal(answer(model, inputs), expected, 2e-3) >= 3
        assert counters["stats"]["unique_graphs"] == FAMILIES[name]
    assert not counters["graph_break"]
    assert len(decoding_of(model).recorder) == 1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna"])
@pytest.mark.parametrize("rows", [1, 3])
def test_image_prompts(vision_case, family, rows):
    case = vision_case(family)
    inputs = on_gpu(case.prompts(rows))
    model = case.model.to("cuda")
    try:
        expected = generate(model, inputs, ShiftKVCache(model, budget=24), min_new_tokens=NEW_TOKENS)
        recorded = len(decoding_of(model).recorder)
        for _ in range(2):
            cache = ShiftKVCache(model, budget=24, max_new_tokens=NEW_TOKENS)
            found = generate(model, inputs, cache, min_new_tokens=NEW_TOKENS, **AHEAD)
            assert as_long_as_equal(found, expected, 2e-3) >= 3
            del cache, found
        assert len(decoding_of(model).recorder) == recorded + 1
    finally:
        model.to("cpu")


def test_a_step_is_one_launch_once_it_is_recorded():
    model = build("llama")
    inputs = {"input_ids": models.prompt_ids().cuda()}
    answer(model, inputs)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        answer(model, inputs)
    launched = sum(event.name == "cudaGraphLaunch" for event in trace.events())
    assert launched == NEW_TOKENS - 1


def test_padded_rows_later_turns_and_larger_storage():
    model = build("gemma3_text")
    inputs, answers = on_gpu(models.left_padded([40, 23])), []
    for room, way in ((None, {}), (3, AHEAD)):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=room)
        found = [generate(model, inputs, cache, min_new_tokens=NEW_TOKENS, **way)]
        more = torch.cat([found[0].sequences, models.prompt_ids(2, 5, seed=1).cuda()], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more.shape[1] - 40), value=1)
        found.append(generate(model, {"input_ids": more, "attention_mask": mask}, cache, **way))
        answers.append(found)
    for expected, found in zip(*answers, strict=True):
        assert as_long_as_equal(found, expected, 2e-3) >= 3


def test_changed_weights_are_read():
    model = build("llama")
    inputs = {"input_ids": models.prompt_ids().cuda()}
    # Of the answers the logits alone: their caches would keep the storage.
    first = answer(model, inputs).logits[3]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    changed = answer(model, inputs).logits[3]
    assert len(decoding_of(model).recorder) == 1  # in place: the recording reads them where they are
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(-model.model.layers[1].mlp.down_proj.weight)
    replaced = answer(model, inputs).logits[3]
    assert not changed.equal(first)
    torch.testing.assert_close(replaced, first, atol=2e-3, rtol=2e-3)


def test_after_a_warm_up_nothing_is_compiled_or_recorded():
    model = build("qwen2", torch.bfloat16)
    warm_up(model, 9, NEW_TOKENS)
    compiled = counters["stats"]["unique_graphs"], len(decoding_of(model).recorder)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        answer(model, {"input_ids": models.prompt_ids().cuda()})
    assert (counters["stats"]["unique_graphs"], len(decoding_of(model).recorder)) == compiled
    assert sum(event.name == "cudaGraphLaunch" for event in trace.events()) == NEW_TOKENS - 1


def test_threads_with_streams_of_their_own():
    """Two caches of one model at once, while a third thread runs the model without any."""
    model = build("llama")
    prompts = [{"input_ids": models.prompt_ids(1, 30, seed=seed).cuda()} for seed in range(2)]
    expected = [answer(model, inputs) for inputs in prompts]
    found, is_over = {}, []

    def run(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            found[number] = [answer(model, prompts[number]) for _ in range(5)]
            torch.cuda.current_stream().synchronize()

    def disturb():
        ids = models.prompt_ids(2, 50).cuda()
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            while not is_over:
                model(ids, use_cache=False)

    torch.cuda.synchronize()
    threads = [Thread(target=run, args=(number,)) for number in range(2)]
    other = Thread(target=disturb)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    is_over.append(True)
    other.join()
    for number, answers in found.items():
        assert len(answers) == 5
        assert all(one.sequences.equal(expected[number].sequences) for one in answers)


def test_recordings_go_with_their_model():
    def held():
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated()

    def live():
        model = build("llama")
        cache = ShiftKVCache(model, budget=9, max_new_tokens=6)
        ids = models.prompt_ids().cuda()
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "custom_generate": decode_ahead}
        model.generate(ids, **{CACHE_ARGUMENT: cache}, **options)
        assert len(decoding_of(model).recorder) == 1
        return weakref.ref(decoding_of(model))

    live()  # what torch keeps once for all
    torch._dynamo.reset()
    before = held()
    gone = live()
    torch._dynamo.reset()
    assert held() - before < 2**20
    assert gone() is None
