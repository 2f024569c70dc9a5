"""Compiled decoding of models with layers of other kinds on a CUDA device; skipped where there is none."""

import copy
import gc
import re

import pytest
import torch
from test_gpu_decoding import AHEAD, as_long_as_equal
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager
from transformers import StaticCache

import models
from mmshiftkv import ShiftKVCache
from mmshiftkv.decode.block_step import decoding_of
from test_exactness import NEW_TOKENS, generate
from test_gpu import on_gpu

pytestmark = [pytest.mark.gpu, models.requires_gpu]
FAMILIES = [name for name, changes in models.HYBRIDS.items() if "attention_chunk_size" not in changes]
LOOPS = {"generate": {}, "decode_ahead": AHEAD}
BUDGET = 9


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def build(name, dtype=torch.float32):
    return models.text_model(name, **models.HYBRIDS[name]).to("cuda", dtype)


def answer(model, inputs, cache, **options):
    return generate(model, inputs, cache, min_new_tokens=NEW_TOKENS, **options)


def recorded(model):
    """How many CUDA graphs have been recorded since the compiler was reset."""
    by_blocks = len(decoding_of(model).recorder)
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return (
        by_blocks
        if manager is None
        else by_blocks + int(re.fullmatch(r"count\((\d+)\)", repr(manager.graph_counter)).group(1))
    )


def compiled_with_static_cache(model):
    """Graphs that transformers' own cache needs for two prompts, and which of them run without CUDA graphs."""
    for tokens in (40, 20):
        cache = StaticCache(config=model.config, max_cache_len=40 + NEW_TOKENS)
        answer(model, {"input_ids": models.prompt_ids(1, tokens).cuda()}, cache)
    found = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
    torch._dynamo.reset()
    counters.clear()
    return found


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", FAMILIES)
def test_one_compilation_and_one_recording_serve_all_caches(name, loop):
    model = build(name)
    allowed, skipped = compiled_with_static_cache(model)
    records = []
    for index, tokens in enumerate((40, 5, 16, 60, 33)):
        inputs = {"input_ids": models.prompt_ids(1, tokens, seed=index).cuda()}
        expected = answer(model, inputs, ShiftKVCache(model, budget=BUDGET))
        cache = ShiftKVCache(model, budget=BUDGET, max_new_tokens=NEW_TOKENS)
        found = answer(model, inputs, cache, **LOOPS[loop])
        assert as_long_as_equal(found, expected, 2e-3) >= 3
        del cache, found
        if index == 0:
            gc.collect()  # the tracer left the cache in a cycle
        records.append(recorded(model))
    # Where the step is compiled by blocks, one for each of two kinds; where blocks share keys and values, as a whole.
    by_blocks = loop == "decode_ahead" and name != "gemma4_text"
    assert counters["stats"]["unique_graphs"] == (2 if by_blocks else 1)
    assert by_blocks or allowed >= 1
    assert counters["inductor"]["cudagraph_skips"] <= skipped
    assert records == records[:1] * 5


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_decoding_is_eager_decoding(name, loop):
    """Padded rows, windows that move within their slots, a later turn and copies of the cache."""
    model = build(name)
    inputs = on_gpu(models.left_padded([40, 23]))
    answers = []
    for room, options in ((None, {}), (3, LOOPS[loop])):
        cache = ShiftKVCache(model, budget=BUDGET, max_new_tokens=room)
        found = [answer(model, inputs, cache, **options)]
        more = torch.cat([found[0].sequences, models.prompt_ids(2, 5, seed=1).cuda()], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more.shape[1] - 40), value=1)
        turn = {"input_ids": more, "attention_mask": mask}
        twin = copy.deepcopy(cache)
        answers.append(found + [answer(model, turn, each, **options) for each in (cache, twin)])
    for found, expected in zip(*reversed(answers), strict=True):
        assert as_long_as_equal(found, expected, 2e-3) >= 3


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_text"])
def test_the_cache_never_waits_for_the_device_in_a_pass(name):
    model = build(name, torch.bfloat16)
    prompt, token = models.prompt_ids(2).cuda(), models.prompt_ids(2, 1).cuda()
    with torch.no_grad():
        for _ in range(2):  # once to warm up
            cache = ShiftKVCache(model, budget=BUDGET, max_new_tokens=8)
            update = cache.update

            def checked(*args, update=update, **kwargs):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    return update(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            cache.update = checked
            model(prompt, past_key_values=cache, use_cache=True)
            for _ in range(3):
                model(token, past_key_values=cache, use_cache=True)
    assert cache.report().tokens_stored == BUDGET + 3
