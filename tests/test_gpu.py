"""On a CUDA device: exactness, no waiting for the device, memory, several devices.  Skipped where there is none."""

import copy

import pytest
import torch
from transformers import DynamicCache

import models
from families.configs import all_families, tiny_model
from mmshiftkv import PrefillSelectionCache, ShiftKVCache, ShiftKVConfig, select_tokens
from mmshiftkv.methods.shiftkv import ShiftKV
from test_exactness import assert_same, generate
from test_masked_reference import assert_decodes_like_the_masked_full_cache
from tiny_vlm.pages import held_out_examples

pytestmark = [pytest.mark.gpu, models.requires_gpu]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(inputs):
    return {name: tensor.to("cuda") for name, tensor in inputs.items()}


@pytest.fixture(scope="module")
def gpu_case(vision_case):
    def load(family, attention="sdpa", dtype=torch.float32):
        case = vision_case(family, attention)
        return models.VisionCase(copy.deepcopy(case.model).to("cuda", dtype), case.processor)

    return load


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna", "mistral"])
def test_a_covering_budget_is_exact(gpu_case, family, attention, dtype):
    case = gpu_case(family, attention, dtype)
    for rows in (1, 3):
        inputs = on_gpu(case.prompts(rows))
        expected = generate(case.model, inputs, DynamicCache(config=case.model.config))
        assert_same(generate(case.model, inputs, ShiftKVCache(case.model, budget=1.0)), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna", "mistral"])
def test_decoding_is_that_of_the_masked_full_cache(gpu_case, family, attention):
    case = gpu_case(family, attention)
    for rows in (1, 3):
        assert_decodes_like_the_masked_full_cache(case.model, on_gpu(case.prompts(rows)), budget=24, tolerance=1e-3)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {}])
def test_ways_to_generate(gpu_case, mode):
    case = gpu_case("qwen2_5_vl", dtype=torch.bfloat16)
    inputs = on_gpu(case.prompts(2))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **mode}
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        cache = ShiftKVCache(case.model, budget=12)
        found.append(case.model.generate(**inputs, past_key_values=cache, **options))
        assert cache.report().tokens_stored == 12 + 7
    assert found[0].equal(found[1])


@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (14, 2), (4, 1)])
def test_the_selection_is_that_of_the_cpu(heads, head_dim):
    generator = torch.Generator().manual_seed(head_dim)
    query_heads, kv_heads = heads
    for tokens in (1, 63, 64, 65, 1023):
        parts = [
            torch.randn(2, count, length, head_dim, generator=generator)
            for count, length in ((query_heads, 64), (query_heads, 1), (kv_heads, tokens))
        ]
        valid = torch.arange(tokens)[None] >= torch.tensor([[0], [tokens // 3]])
        arguments = {"budget": 64, "num_groups": 8}
        expected = select_tokens(*parts, valid=valid, **arguments)
        found = select_tokens(*(part.cuda() for part in parts), valid=valid.cuda(), **arguments)
        assert found.shape == expected.shape
        # float32 sums in another order: scores that nearly tie may change places
        overlap = (found.cpu()[..., None] == expected[..., None, :]).any(-1).float().mean()
        assert overlap >= 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_reference_agree_on_the_queries_and_keys_of_documents(dtype):
    """The embedded model's own activations: all of float32's tokens, and 99.5 % of bfloat16's, where scores tie."""
    case = models.qwen2_5_vl(dtype="float32" if dtype == torch.float32 else "bfloat16")
    model = case.model.to("cuda")
    overlaps = []
    score = ShiftKV.score

    def compared(self, layer, summary, keys, values, valid):
        queries = summary.queries, summary.last_query
        arguments = {"budget": 64, "num_groups": summary.groups, "scaling": layer.scaling, "valid": valid}
        kept, expected = (
            select_tokens(*(part.to(kind) for part in (*queries, keys)), backend=backend, **arguments)
            for backend, kind in (("triton", dtype), ("torch", torch.float32))
        )
        overlaps.append((kept[..., None] == expected[..., None, :]).any(-1).float().mean().item())
        return score(self, layer, summary, keys, values, valid)

    for index, example in enumerate(held_out_examples(24, seed=5)):
        inputs = on_gpu(case.inputs((example.question, example.image)))
        config = ShiftKVConfig.for_model(model, budget=64, seed=index)
        cache = PrefillSelectionCache(model, type("Compared", (ShiftKV,), {"score": compared})(config), config.budget)
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
    assert len(overlaps) == 24 * 6
    mean = sum(overlaps) / len(overlaps)
    assert mean == 1.0 if dtype == torch.float32 else mean >= 0.995, mean


@pytest.mark.parametrize("reserved", [None, 8])
def test_the_cache_never_waits_for_the_device(reserved):
    model = models.text_model("qwen2").to("cuda", torch.bfloat16)
    prompt, token = models.prompt_ids(2).cuda(), models.prompt_ids(2, 1).cuda()
    with torch.no_grad():
        for _ in range(2):  # once to warm up
            cache = ShiftKVCache(model, budget=9, max_new_tokens=reserved)
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
    assert cache.report().tokens_stored == 12


def test_the_same_seed_selects_the_same_tokens_again():
    model = models.text_model("qwen3").to("cuda", torch.bfloat16)
    caches = [ShiftKVCache(model, budget=9, seed=seed) for seed in (4, 4, 5)]
    state = torch.cuda.get_rng_state()
    for cache in caches:
        with torch.no_grad():
            model(models.prompt_ids(2, 200).cuda(), past_key_values=cache, use_cache=True)
    assert torch.cuda.get_rng_state().equal(state)
    kept = [torch.stack([cache.kept_indices(layer) for layer in range(3)]) for cache in caches]
    assert kept[0].equal(kept[1])
    assert not kept[0].equal(kept[2])


def test_memory_after_prefill_is_that_of_the_budget():
    model = models.text_model(
        "llama", num_hidden_layers=8, hidden_size=256, num_attention_heads=8, head_dim=64, num_key_value_heads=8
    )
    model = model.to("cuda", torch.bfloat16)
    prompt = models.prompt_ids(1, 500).repeat(1, 16).cuda()

    def measure(cache):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            model.model(prompt, past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before

    for _ in range(2):  # once to warm up
        full, full_peak = measure(DynamicCache(config=model.config))
        cache = ShiftKVCache(model, budget=64)
        held, peak = measure(cache)
    assert cache.report().bytes_stored == 8 * 64 * 2 * 8 * 64 * 2
    # Beside the stored tokens: indices, step factors, and what the allocator rounds up.
    assert held <= cache.report().bytes_stored + (1 << 20)
    assert full >= 8 * 8000 * 2 * 8 * 64 * 2
    assert peak < full_peak


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna"])
def test_a_model_over_two_devices(gpu_case, family):
    from accelerate import dispatch_model

    case = gpu_case(family)
    inputs = on_gpu(case.prompts(2))
    expected = ShiftKVCache(case.model, budget=16)
    wanted = generate(case.model, inputs, expected)
    layers = len(expected.layers)
    devices = models.device_map(case.model, lambda index: int(index >= layers // 2), 0)
    split = dispatch_model(copy.deepcopy(case.model), device_map=devices)
    with pytest.warns(UserWarning, match="the weights are offloaded, or on several devices"):
        reserving = ShiftKVCache(split, budget=16, max_new_tokens=40)
    assert not reserving.is_compileable
    assert generate(split, inputs, reserving).sequences.equal(wanted.sequences)
    cache = ShiftKVCache(split, budget=16)
    found = generate(split, inputs, cache)
    assert found.sequences.equal(wanted.sequences)
    assert {layer.keys.device.index for layer in cache.layers} == {0, 1}
    for index in range(layers):
        assert cache.kept_indices(index).device == cache.layers[index].keys.device
        assert cache.kept_indices(index).cpu().equal(expected.kept_indices(index).cpu())


ASKED = ("phi3", "gpt_oss", "gemma2", "deepseek_v3", "llama4_text", "gemma4_text", "qwen3_5_text", "cohere2", "jetmoe")


@pytest.mark.parametrize("preset", ["published", "value-aware"])
@pytest.mark.parametrize("name", ASKED)
def test_other_queries_and_logits_with_kernels_and_without(name, preset):
    """Asked queries, latents, learned sinks, soft-capping: Triton keeps what plain torch keeps, and never waits."""
    families = {family.name: family for family in all_families()}
    if name not in families:
        pytest.skip(f"this transformers has no {name}")
    model = tiny_model(families[name], "eager").to("cuda")
    caches = [ShiftKVCache(model, budget=9, preset=preset, backend=backend) for backend in ("triton", "torch")]
    with torch.no_grad():
        for cache in caches:
            model(models.prompt_ids(2, 70).cuda(), past_key_values=cache, use_cache=True)
    for index in range(len(caches[0].layers)):
        kept, expected = (cache.kept_indices(index) for cache in caches)
        assert (kept is None and expected is None) or kept.equal(expected)
    token = models.prompt_ids(2, 1).cuda()
    with torch.no_grad():
        found, other = (model(token, past_key_values=cache, use_cache=True).logits for cache in caches)
    torch.testing.assert_close(found, other, atol=1e-3, rtol=1e-3)
