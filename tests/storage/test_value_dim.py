"""Values whose head dim is not that of the keys, as in MiMo-V2-Flash and in models with latent attention."""

import pytest
import torch
from transformers import DynamicCache

import models
from masked_reference import dropped_entries_masked
from mmshiftkv import ShiftKVCache, make_cache
from test_exactness import assert_same, generate

PEERS = {"snapkv": {"window": 5}, "expected_attention": {}, "keydiff": {}, "streaming_llm": {}, "random": {}}
VALUE_DIMS = [8, 24]  # keys have 16
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


@pytest.fixture(params=VALUE_DIMS)
def model(request):
    full = {"layer_types": ["full_attention"] * 3, "v_head_dim": request.param}
    return models.text_model("mimo_v2_flash", attention="eager", **full, **EXPERTS)


@pytest.mark.parametrize("storage", [{}, {"max_new_tokens": 12}], ids=["growing", "static"])
@pytest.mark.parametrize("settings", [{}, {"score": "values", "refit_queries": 0}])
def test_decoding_is_that_of_the_masked_full_cache(model, storage, settings):
    inputs = models.left_padded([40, 23, 7])
    cache = ShiftKVCache(model, budget=10, **storage, **settings)
    found = generate(model, inputs, cache, disable_compile=True)
    kept = {layer: cache.kept_indices(layer) for layer in range(3)}
    assert all(indices.shape == (3, 2, 10) for indices in kept.values())
    with dropped_entries_masked(model, kept, inputs["attention_mask"].bool()):
        expected = generate(model, inputs, DynamicCache(config=model.config))
    assert found.sequences.equal(expected.sequences)
    # float32: the sums run over fewer terms, in another order
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("storage", [{}, {"max_new_tokens": 12}], ids=["growing", "static"])
def test_values_are_refitted_and_bytes_counted(model, storage):
    inputs, value_dim = models.left_padded([40, 23]), model.config.v_head_dim
    plain, refitted = (
        ShiftKVCache(model, budget=10, preset="value-aware", refit_queries=queries, **storage) for queries in (0, 64)
    )
    for cache in (plain, refitted):
        generate(model, inputs, cache, num_beams=2, disable_compile=True)
        layer = cache.report().layers[1]
        assert layer.bytes_full == layer.tokens_seen * 4 * 2 * (16 + value_dim) * 4  # rows, KV heads, float32
    mine, theirs = (cache.layers[0].values[:, :, :10] for cache in (refitted, plain))
    assert mine.shape == (4, 2, 10, value_dim)
    assert not mine.equal(theirs)
    for cache in (plain, refitted):
        cache.reset()
        generate(model, inputs, cache, disable_compile=True)
        assert cache.layers[0].values.shape[-1] == value_dim


@pytest.mark.parametrize("method", PEERS)
def test_every_method_selects(model, method):
    cache = make_cache(method, model, 10, **PEERS[method])
    generate(model, models.left_padded([40, 23, 7]), cache)
    assert cache.kept_indices(2).shape == (3, 2, 10)


def test_a_covering_budget_changes_nothing(model):
    inputs = models.left_padded([40, 23, 7])
    expected = generate(model, inputs, DynamicCache(config=model.config))
    assert_same(generate(model, inputs, ShiftKVCache(model, budget=1.0, preset="value-aware")), expected)
