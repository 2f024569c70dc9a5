"""The baselines as methods and caches.  That they keep what kvpress keeps is in test_kvpress.py."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

import mmshiftkv
import models
from mmshiftkv import METHODS, Method, PrefillSelectionCache, SnapKVCache, make_cache
from mmshiftkv.methods.expected_attention import ExpectedAttention
from mmshiftkv.methods.keydiff import KeyDiff
from mmshiftkv.methods.random_tokens import Random
from mmshiftkv.methods.snapkv import SnapKV
from mmshiftkv.methods.streaming_llm import StreamingLLM
from mmshiftkv.model.decoder import Decoder
from mmshiftkv.model.hooks import LayerInput
from mmshiftkv.model.positions import Positions
from mmshiftkv.registry import CACHES
from test_exactness import assert_same, generate

BUDGET = 12
SETTINGS = {"snapkv": {"window": 5}}
LENGTHS = [40, 23, 13, 4]


PEERS = {name: cache for name, cache in CACHES.items() if name != "shiftkv"}


@dataclass(frozen=True)
class Watched(Method):
    """A method, and what it was asked and answered."""

    method: object
    calls: list

    def observe(self, layer, observation, earlier):
        return self.method.observe(layer, observation, earlier)

    def score(self, layer, summary, keys, values, valid):
        self.calls.append((layer, summary, keys, values, valid, self.method.score(layer, summary, keys, values, valid)))
        return self.calls[-1][-1]


def prefill(model, inputs, cache):
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache


def watched(model, inputs, method, budget=BUDGET):
    """What a method was given and gave, (layer, summary, keys, values, valid, scores) for each layer."""
    calls = []
    prefill(model, inputs, PrefillSelectionCache(model, Watched(method, calls), budget))
    return calls


def baseline(method, model, **settings):
    return make_cache(method, model, BUDGET, **{**SETTINGS.get(method, {}), **settings})


@pytest.mark.parametrize("method", [StreamingLLM(), SnapKV(5), KeyDiff(), ExpectedAttention(), Random()])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_finite_and_not_negative(method, kv_heads, dtype):
    model = models.text_model(num_key_value_heads=kv_heads).to(dtype)
    for inputs in (models.left_padded([40]), models.left_padded(LENGTHS)):
        for *_, keys, _, _, scores in watched(model, inputs, method):
            assert scores.dtype == torch.float32
            assert scores.shape == keys.shape[:3]
            assert scores.isfinite().all()
            assert (scores >= 0).all()


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_row_keeps_the_same_tokens_as_alone(method, model_type):
    model, inputs = models.text_model(model_type), models.left_padded(LENGTHS)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1  # zero otherwise, and so would be the keys of padding
    together = prefill(model, inputs, baseline(method, model))
    for row, length in enumerate(LENGTHS):
        padding = max(LENGTHS) - length
        alone = prefill(model, {"input_ids": inputs["input_ids"][row : row + 1, padding:]}, baseline(method, model))
        for layer in range(3):
            kept = together.kept_indices(layer)[row]
            assert (kept[kept >= padding].view(len(kept), -1) - padding).equal(alone.kept_indices(layer)[0])


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("chunk", [3, 15, 39])
def test_chunks_keep_what_a_single_pass_keeps(method, chunk):
    model, inputs = models.text_model("qwen2"), models.left_padded(LENGTHS)
    single = prefill(model, inputs, baseline(method, model))
    cache = baseline(method, model, prefill="chunked", prompt_length=40)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk)
    for layer in range(3):
        assert cache.kept_indices(layer).equal(single.kept_indices(layer))


@pytest.mark.parametrize("method", PEERS)
def test_assisted_decoding_selects_from_the_prompt_and_the_tokens_accepted_with_it(method):
    model, inputs = models.text_model("llama"), models.left_padded([40])
    cache = baseline(method, model)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    seen = cache.kept_indices(0)[0, 0, -1].item() + 1
    with torch.no_grad():
        again = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    single = prefill(model, {"input_ids": again[:, :seen]}, baseline(method, model))
    assert all(cache.kept_indices(layer).equal(single.kept_indices(layer)) for layer in range(3))


@pytest.mark.parametrize("method", METHODS)
def test_a_covering_budget_changes_nothing(vision_case, method):
    case = vision_case("qwen2_5_vl")
    inputs = case.prompts(2)
    expected = generate(case.model, inputs, DynamicCache(config=case.model.config))
    assert_same(generate(case.model, inputs, make_cache(method, case.model, 1.0)), expected)


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna"])
def test_image_prompts_are_compressed(vision_case, method, family):
    case = vision_case(family)
    cache = make_cache(method, case.model, 40)
    output = case.model.generate(**case.prompts(2), past_key_values=cache, num_beams=2, max_new_tokens=4)
    assert output.shape[0] == 2
    assert cache.kept_indices(1).shape == (4, case.model.config.get_text_config().num_key_value_heads, 40)


def test_streaming_llm_keeps_the_first_and_the_last_tokens():
    model, inputs = models.text_model(), models.left_padded(LENGTHS)
    for sinks in (0, 3, 11):
        kept = prefill(model, inputs, make_cache("streaming_llm", model, BUDGET, sinks=sinks)).kept_indices(2)
        for row, length in enumerate(LENGTHS[:3]):
            first = 40 - length
            expected = [*range(first, first + sinks), *range(40 - BUDGET + sinks, 40)]
            assert kept[row].tolist() == [expected, expected]


@pytest.mark.parametrize("method", ["snapkv", "expected_attention"])
def test_protected_tokens_are_kept_whatever_the_others_are(method):
    model, inputs = models.text_model(), models.left_padded([40, 30])
    # Values so long that a maximum plus one is the maximum again, and keys that take all attention.
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.v_proj.weight *= 1e12
            block.self_attn.k_proj.weight *= 30
    cache = prefill(model, inputs, baseline(method, model))
    for row, first in enumerate((0, 10)):
        protected = range(first, first + 4) if method == "expected_attention" else range(35, 40)
        for layer in range(3):
            for head in cache.kept_indices(layer)[row].tolist():
                assert set(protected) <= set(head)


def test_a_share_below_the_protected_tokens_keeps_the_nearest_of_them():
    model, inputs = models.text_model(), models.left_padded([40])
    share = 0.1  # 4 tokens
    kept = {
        method: prefill(model, inputs, make_cache(method, model, share)).kept_indices(0)[0, 0].tolist()
        for method in ("streaming_llm", "snapkv", "expected_attention")
    }
    assert kept["snapkv"] == [36, 37, 38, 39]
    assert kept["streaming_llm"] == kept["expected_attention"] == [0, 1, 2, 39]


def test_snapkv_attends_as_the_model_does():
    model = models.text_model("qwen3", attention="eager")
    inputs = models.left_padded([40, 23])
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    for window, kernel_size in ((1, 1), (6, 1), (20, 5)):
        calls = watched(model, inputs, SnapKV(window, kernel_size), budget=20)
        for (*_, scores), attention in zip(calls, attentions, strict=True):
            mass = attention[:, :, -window:, :-window].mean(dim=2).unflatten(1, (2, 2)).mean(dim=2)
            padded = torch.nn.functional.pad(mass, (kernel_size // 2, kernel_size // 2))
            pooled = padded.unfold(-1, kernel_size, 1).mean(dim=-1)
            torch.testing.assert_close(scores[..., :-window], pooled, atol=1e-6, rtol=1e-4)


def test_snapkv_remembers_only_its_window():
    model = models.text_model()
    layer = Decoder(model, [0]).attention[0]
    states = torch.randn(2, 50, 64)
    cos = sin = torch.randn(1, 50, 16)
    method, summary = SnapKV(window=6), None
    for start, stop in ((0, 4), (4, 5), (5, 30), (30, 47), (47, 50)):
        inputs = LayerInput(states, Positions((cos, sin)), None)
        summary = method.observe(layer, inputs.tokens(start, stop), summary)
        expected = states[:, max(stop - 6, 0) : stop]
        assert summary.hidden_states.equal(expected)
        assert summary.positions.factors[0].shape[1] == expected.shape[1]
        assert summary.hidden_states.untyped_storage().nbytes() == expected.nbytes


def test_keydiff_prefers_the_key_that_is_unlike_the_others():
    layer = Decoder(models.text_model(), [0]).attention[0]
    keys = torch.ones(1, 2, 30, 16) + 0.01 * torch.randn(1, 2, 30, 16)
    keys[:, 0, 7], keys[:, 1, 21] = -1, 0
    keys[:, :, 3] *= 100  # length does not count
    scores = KeyDiff().score(layer, None, keys, keys, None)
    assert scores.argmax(dim=-1).tolist() == [[7, 21]]
    assert scores[:, :, 3].max() < 0.01


@pytest.mark.parametrize(("sinks", "epsilon"), [(4, 0.0), (0, 0.02)])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna"])
def test_expected_attention_is_that_of_the_formula(vision_case, family, sinks, epsilon):
    case = vision_case(family)
    inputs = case.prompts(2)
    method = ExpectedAttention(future_positions=20, sinks=sinks, epsilon=epsilon)
    observed = []

    @dataclass(frozen=True)
    class Observing(ExpectedAttention):
        def observe(self, layer, observation, earlier):
            observed.append(observation)
            return super().observe(layer, observation, earlier)

    calls = watched(case.model, inputs, Observing(20, sinks, epsilon), budget=30)
    assert method.protected == sinks + 1
    for (layer, _, keys, values, valid, scores), observation in zip(calls, observed, strict=True):
        dims, heads_each = keys.shape[-1], layer.module.num_key_value_groups
        basis = torch.eye(dims).expand(2, 1, dims, dims)
        later = layer.rotary.ahead(observation.positions.tokens(-1), count=20, stride=1).factors
        by_step = [tuple(part[:, [step]].expand(2, dims, -1) for part in later) for step in range(20)]
        steps = [layer.rotate(basis, factors)[:, 0] for factors in by_step]
        rotation = torch.stack(steps).double().mean(dim=0)  # a row vector times it is rotated
        queries = layer.unrotated(observation.hidden_states, observation.positions).double()
        for row in range(2):
            first = int((~valid[row]).sum()) + sinks
            for head in range(keys.shape[1]):
                expected = 0
                for query_head in range(head * heads_each, (head + 1) * heads_each):
                    of_head = queries[row, query_head, first:]
                    mean = of_head.mean(dim=0) @ rotation[row]
                    covariance = rotation[row].T @ torch.cov(of_head.T, correction=0) @ rotation[row]
                    k = keys[row, head, first:].double() * layer.scaling
                    expected = expected + (k @ mean + ((k @ covariance) * k).sum(dim=-1) / 2).softmax(dim=0)
                expected = (expected / heads_each + epsilon) * values[row, head, first:].double().norm(dim=-1)
                found = scores[row, head, first:].double()
                torch.testing.assert_close(
                    found - found.mean(), expected.log() - expected.log().mean(), atol=2e-3, rtol=1e-3
                )


def test_expected_attention_orders_what_would_underflow():
    model = models.text_model()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.k_proj.weight *= 20
    for *_, scores in watched(model, {"input_ids": models.prompt_ids()}, ExpectedAttention()):
        ordered = scores[..., 4:].sort(dim=-1).values
        assert ordered[..., -1].max() > 200  # exp(-200) is zero in float32
        assert (ordered.diff(dim=-1) > 0).all()


def test_random_depends_on_seed_and_layer_alone():
    model, inputs = models.text_model(), models.left_padded([40])
    state = torch.random.get_rng_state()
    first, same, other = (
        [prefill(model, inputs, make_cache("random", model, BUDGET, seed=seed)).kept_indices(i) for i in range(3)]
        for seed in (1, 1, 2)
    )
    assert torch.random.get_rng_state().equal(state)
    assert all(map(torch.equal, first, same))
    assert not any(map(torch.equal, first, other))
    assert not first[0].equal(first[1])
    assert not first[0][:, 0].equal(first[0][:, 1])


def test_random_is_the_same_from_the_end_of_long_prompts():
    layer = Decoder(models.text_model(), [0]).attention[0]
    short, long = (
        Random().score(layer, None, torch.empty(1, 2, tokens, 16), torch.empty(1, 2, tokens, 16), None)
        for tokens in (4095, 8193)
    )
    assert long[..., -4095:].equal(short)
    assert long.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("method", PEERS)
def test_caches_can_be_copied_and_reused(method):
    model, inputs = models.text_model(), models.left_padded([40, 30])
    cache = baseline(method, model, max_new_tokens=4)
    prefill(model, inputs, cache)
    twin = copy.deepcopy(cache)
    expected = cache.kept_indices(1)
    cache.reset()
    assert prefill(model, inputs, cache).kept_indices(1).equal(expected)
    assert twin.kept_indices(1).equal(expected)
    assert models.hooks_on(model) == 0


def test_there_is_one_registry():
    model = models.text_model()
    assert ("full", *CACHES) == ("full", "shiftkv", *PEERS) == METHODS
    assert set(PEERS) == {"random", "streaming_llm", "expected_attention", "snapkv", "keydiff"}
    for method, cache in PEERS.items():
        assert type(make_cache(method, model, 64)) is cache
        assert getattr(mmshiftkv, cache.__name__) is cache
    assert type(make_cache("full", model)) is DynamicCache
    assert make_cache("shiftkv", model, 8, gamma=2.0).config.gamma == 2.0


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (("snap", 64), {}, ValueError, "method='snap' must be one of 'full', 'shiftkv', 'random', 'streaming_llm'"),
        (("snapkv",), {}, TypeError, "budget is missing"),
        (("snapkv", 0), {}, ValueError, "budget=0 must be an int >= 1"),
        (("snapkv", "64"), {}, TypeError, "budget='64'"),
        (("snapkv", 31), {}, ValueError, r"budget=31 must be at least 32: SnapKV\(window=32, kernel_size=5\) always"),
        (("streaming_llm", 4), {}, ValueError, "budget=4 must be at least 5"),
        (("expected_attention", 7), {"sinks": 7}, ValueError, "budget=7 must be at least 8"),
        (("snapkv", 64), {"windows": 3}, TypeError, "unknown setting windows; SnapKV has window, kernel_size"),
        (("keydiff", 64), {"window": 3}, TypeError, "unknown setting window; KeyDiff has none"),
        (("snapkv", 64), {"refit_queries": 8}, TypeError, "refit_queries: SnapKV has no refit; its settings: window"),
        (("full", 64), {"window": 3}, TypeError, "unknown setting window; the full cache has none"),
        (("snapkv", 64), {"window": 0}, ValueError, "window=0 must be an int >= 1"),
        (("snapkv", 64), {"kernel_size": 4}, ValueError, "kernel_size=4 must be odd"),
        (("streaming_llm", 64), {"sinks": -1}, ValueError, "sinks=-1"),
        (("expected_attention", 64), {"future_positions": 0}, ValueError, "future_positions=0"),
        (("expected_attention", 64), {"epsilon": float("nan")}, ValueError, "epsilon=nan"),
        (("random", 64), {"seed": 2**32}, ValueError, "seed=4294967296"),
        (("keydiff", 64), {"prefill": "chunky"}, ValueError, "prefill='chunky' must be one of 'single', 'chunked'"),
        (("keydiff", 64), {"prompt_length": 5}, ValueError, 'prompt_length=5 is only for prefill="chunked"'),
        (("keydiff", 64), {"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
    ],
)
def test_bad_arguments_are_refused(arguments, settings, error, message):
    method, *budget = arguments
    with pytest.raises(error, match=message):
        make_cache(method, models.text_model(), *budget, **settings)


def test_a_cache_is_made_by_keywords():
    model, inputs = models.text_model(), models.left_padded([40])
    made = make_cache("snapkv", model, BUDGET, window=5)
    assert (
        prefill(model, inputs, SnapKVCache(model, budget=BUDGET, window=5))
        .kept_indices(0)
        .equal(prefill(model, inputs, made).kept_indices(0))
    )


@pytest.mark.gpu
@models.requires_gpu
@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("prefill_mode", ["single", "chunked"])
def test_a_baseline_never_waits_for_the_device(method, prefill_mode):
    model = models.text_model("qwen2").to("cuda", torch.bfloat16)
    prompt = models.prompt_ids(2).cuda()
    for _ in range(2):  # once to warm up
        cache = baseline(method, model, prefill=prefill_mode)
        update = cache.update

        def checked(*args, update=update):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return update(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        cache.update = checked
        for part in (prompt[:, :30], prompt[:, 30:]) if prefill_mode == "chunked" else (prompt,):
            prefill(model, {"input_ids": part}, cache)
    assert cache.report().tokens_seen == 40
