"""Compiled decoding, flash and flex attention on a CUDA device; skipped where there is none."""

import copy
import gc
import importlib.util
from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig, DynamicCache

import models
from mmshiftkv import ShiftKVCache, decode_ahead, decoding_backend
from test_exactness import assert_same, generate
from test_gpu import on_gpu

pytestmark = [pytest.mark.gpu, models.requires_gpu]
NEW_TOKENS = 12  # those of test_exactness.generate
MERGED = {"compile_config": CompileConfig(backend=decoding_backend, mode=None)}
AHEAD = {"custom_generate": decode_ahead}
needs_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def as_long_as_equal(one, other, tolerance):
    """Logits within the tolerance up to the first token that differs, which a near tie may cause."""
    steps = 0
    start = one.sequences.shape[1] - len(one.logits)
    for step, (mine, theirs) in enumerate(zip(one.logits, other.logits, strict=True)):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
        steps += 1
        if not one.sequences[:, start + step].equal(other.sequences[:, start + step]):
            break
    return steps


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.5), (torch.float16, 0.06)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_compiled_decoding_is_eager_decoding(vision_case, attention, dtype, tolerance):
    """The embedded model, whose logits reach 20 and more: bfloat16 rounds those to 1/8."""
    case = vision_case("qwen2_5_vl", attention)
    model = copy.deepcopy(case.model).to("cuda", dtype)
    for rows in (1, 3):
        inputs = on_gpu(case.prompts(rows))
        expected = generate(model, inputs, ShiftKVCache(model, budget=40))
        for options in ({}, AHEAD, MERGED):
            cache = ShiftKVCache(model, budget=40, max_new_tokens=NEW_TOKENS)
            found = generate(model, inputs, cache, **options)
            if dtype == torch.float32:
                assert found.sequences.equal(expected.sequences)
            assert as_long_as_equal(found, expected, tolerance) >= 3
    # For each number of rows: the whole step with either backend, and the block of `decode_ahead`.
    assert counters["stats"]["unique_graphs"] == 6
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("options", [{}, AHEAD], ids=["generate", "decode_ahead"])
def test_two_hundred_caches_in_a_row_use_one_compilation_and_one_storage(options):
    model = models.text_model("qwen2").to("cuda", torch.bfloat16)
    places = set()
    for index in range(200):
        tokens = 3 + 7 * (index % 60)
        cache = ShiftKVCache(model, budget=32, max_new_tokens=6)
        ids = models.prompt_ids(1, tokens, seed=index).cuda()
        model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, **options)
        places.add((*(layer.keys.data_ptr() for layer in cache.layers), cache.layers[0].filled.data_ptr()))
        del cache
        if index == 0:
            gc.collect()  # the tracer left the cache in a cycle
    assert len(places) == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize(("rows", "kind"), [(1, "token"), (2, "rows"), (16, "rows"), (17, None)])
@pytest.mark.parametrize("options", [AHEAD, MERGED], ids=["decode_ahead", "generate"])
def test_projections_of_up_to_sixteen_rows_are_merged(options, rows, kind):
    """Four launches in each of three layers (queries, keys and values; output; gate and up; down), and the logits'."""
    model = models.text_model().to("cuda", torch.bfloat16)
    ids = models.prompt_ids(rows).cuda()

    def run():
        cache = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS)
        generate(model, {"input_ids": ids}, cache, min_new_tokens=NEW_TOKENS, **options)
        torch.cuda.synchronize()

    run()  # compiles
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
    names = Counter(event.name for event in trace.events())
    found = {name: count for name, count in names.items() if name.startswith("_project_")}
    of_layers = {"token": {"token": 10, "gate": 3}, "rows": {"rows": 13}, None: {}}[kind]
    assert found == {f"_project_{name}_kernel": count * (NEW_TOKENS - 1) for name, count in of_layers.items()}
    # What Inductor made of the rest is named after what is in it.
    assert any("triton" in name and "silu" in name for name in names) == (kind != "token")


def test_more_tokens_than_reserved_move_to_larger_storage():
    model = models.text_model().to("cuda")
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    ids = models.prompt_ids().cuda()
    expected = model.generate(ids, past_key_values=ShiftKVCache(model, budget=9), **options)
    for more in ({}, AHEAD):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=4)
        assert model.generate(ids, past_key_values=cache, **options, **more).equal(expected)
        torch.cuda.synchronize()
        assert cache.layers[0].slots == 26


def test_a_later_turn_and_copies():
    model = models.text_model().to("cuda")
    question = models.prompt_ids(1, 9, seed=2).cuda()
    answers = []
    for room in (None, NEW_TOKENS):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=room)
        first = generate(model, {"input_ids": models.prompt_ids().cuda()}, cache)
        twin = copy.deepcopy(cache)
        turn = {"input_ids": torch.cat([first.sequences, question], dim=1)}
        answers.append([generate(model, turn, each).sequences for each in (cache, twin)])
    assert all(answer.equal(answers[0][0]) for pair in answers for answer in pair)


@needs_flash
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[40], [300, 17, 171]])
def test_flash_attention(heads, head_dim, lengths):
    """A covering budget is exact; a small one is decoded as with sdpa, and never in slots that are not written."""
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": head_dim}
    model = models.text_model("llama", **shape).to("cuda", torch.bfloat16)
    model.set_attn_implementation("flash_attention_2")
    inputs = on_gpu(models.left_padded(lengths))
    expected = generate(model, inputs, DynamicCache(config=model.config))
    assert_same(generate(model, inputs, ShiftKVCache(model, budget=1.0)), expected)
    with pytest.warns(UserWarning, match="attn_implementation='flash_attention_2' would read slots"):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS)
    assert not cache.is_compileable
    generate(model, inputs, cache, min_new_tokens=NEW_TOKENS)
    assert cache.report().tokens_stored == 9 + NEW_TOKENS - 1
    assert_one_step_is_that_of_sdpa(model, inputs)


def assert_one_step_is_that_of_sdpa(model, inputs):
    """Both read the same compressed cache; bfloat16 attention differs by about 1 % between implementations."""
    cache = ShiftKVCache(model, budget=9)
    mask = inputs["attention_mask"]
    logits = []
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
        longer = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1)
        positions = longer.cumsum(-1)[:, -1:] - 1
        for attention in ("flash_attention_2", "sdpa"):
            model.set_attn_implementation(attention)
            step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": longer, "position_ids": positions}
            logits.append(model(**step, past_key_values=copy.deepcopy(cache), use_cache=True).logits.float())
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[1].norm()


@needs_flash
def test_flash_attention_in_other_ways_to_generate():
    model = models.text_model("llama", head_dim=64).to("cuda", torch.bfloat16)
    model.set_attn_implementation("flash_attention_2")
    inputs = on_gpu(models.left_padded([40, 23]))
    for options in ({"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        expected = generate(model, inputs, DynamicCache(config=model.config), **options)
        found = generate(model, inputs, ShiftKVCache(model, budget=1.0), **options)
        assert found.sequences.equal(expected.sequences)
    cache = ShiftKVCache(model, budget=9, prefill="chunked")
    single = ShiftKVCache(model, budget=9)
    generate(model, inputs, cache, prefill_chunk_size=16)
    generate(model, inputs, single)
    alike = (cache.kept_indices(0)[..., None] == single.kept_indices(0)[..., None, :]).any(-1).float().mean()
    assert alike > 0.95


@pytest.mark.parametrize("family", ["llama", "vicuna"])
def test_flex_attention(vision_case, family):
    if family == "llama":
        model = models.text_model("llama", attention="flex_attention").to("cuda")
        batches = [on_gpu(models.left_padded(lengths)) for lengths in ([40], [40, 17])]
    else:
        case = vision_case(family)
        model = copy.deepcopy(case.model).to("cuda")
        model.set_attn_implementation({"text_config": "flex_attention"})
        batches = [on_gpu(case.prompts(rows)) for rows in (1, 3)]
    for inputs in batches:
        expected = generate(model, inputs, DynamicCache(config=model.config))
        found = generate(model, inputs, ShiftKVCache(model, budget=1.0))
        assert found.sequences.equal(expected.sequences)
        cache = ShiftKVCache(model, budget=9)
        generate(model, inputs, cache)
        assert cache.report().tokens_stored == 9 + NEW_TOKENS - 1
        assert not cache.is_compileable
