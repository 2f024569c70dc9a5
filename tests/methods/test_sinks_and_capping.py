"""Learned sinks (gpt-oss) and capped logits (Gemma 2): as arguments of the selection, and in models that have them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import models
from masked_reference import dropped_entries_masked
from mmshiftkv import PrefillSelectionCache, ShiftKVCache, make_cache, refit_values, select_tokens
from mmshiftkv.methods.expected_attention import ExpectedAttention
from shiftkv_kernels import group_mass, value_scores, vote
from test_exactness import assert_same, generate

LENGTHS = [40, 23, 7]
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 16}
METHODS = {"shiftkv": {}, "snapkv": {"window": 5}, "expected_attention": {}}


def inputs(seed=0, tokens=30, heads=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, heads, 8, 16), (1, heads, 1, 16), (1, 2, tokens, 16), (1, 2, tokens, 24)
    return [torch.randn(shape, generator=generator) for shape in shapes]


SEEDS = {"seed": st.integers(0, 10_000), "tokens": st.integers(2, 40), "padding": st.integers(0, 39)}


@settings(deadline=None, max_examples=25)
@given(**SEEDS)
def test_a_cap_that_is_out_of_reach_and_sinks_that_take_nothing_change_nothing(seed, tokens, padding):
    proxies, last, keys, values = inputs(seed, tokens)
    valid = torch.arange(tokens)[None] >= min(padding, tokens - 1)
    common = {"scaling": 0.25, "valid": valid}
    sinks = torch.full((4,), -torch.inf)
    for more in ({"softcap": 1e5}, {"sinks": sinks}, {"sinks": sinks.nan_to_num(neginf=-1e30), "softcap": 1e5}):
        for mine, plain in zip(
            group_mass(proxies, last, keys, num_groups=2, **common, **more),
            group_mass(proxies, last, keys, num_groups=2, **common),
            strict=True,
        ):
            torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-4)
        mine, plain = (value_scores(proxies, last, keys, values, **common, **part) for part in (more, {}))
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-3)


@settings(deadline=None, max_examples=25)
@given(sink=st.sampled_from([-3.0, 0.0, 5.0, 60.0]), mass=st.sampled_from([0.5, 0.95]), **SEEDS)
def test_a_group_votes_for_the_same_tokens_however_much_a_sink_takes(seed, tokens, padding, sink, mass):
    # One query head, and a group of one proxy, which is the last query: a sink takes the same from all that is summed.
    _, last, keys, _ = inputs(seed, tokens, heads=2)
    valid = torch.arange(tokens)[None] >= min(padding, tokens - 1)
    common = {"num_groups": 1, "scaling": 0.25, "valid": valid}
    plain, _ = group_mass(last, last, keys, **common)
    taken, _ = group_mass(last, last, keys, sinks=torch.full((2,), sink), **common)
    assert (taken.sum(-1) <= plain.sum(-1)).all()
    assert vote(taken, mass).equal(vote(plain, mass))


def test_taking_a_token_out_changes_an_output_by_what_step_8_says_with_a_sink_too():
    query, _, keys, values = (part[0, 0].double() for part in inputs())
    logits, sink = keys @ query[0] / 4, torch.tensor([1.5], dtype=torch.float64)

    def attention(rows):
        return torch.cat([logits[rows], sink]).softmax(dim=0)[:-1]

    everything = torch.arange(30)
    output = attention(everything) @ values
    for token, share in enumerate(attention(everything)):
        others = everything[everything != token]
        without = attention(others) @ values[others]
        expected = share / (1 - share) * (values[token] - output).norm()
        torch.testing.assert_close((without - output).norm(), expected)


def test_a_refit_makes_up_for_what_is_missing_behind_sinks_and_capped_logits():
    proxies, last, keys, values = inputs(tokens=60)
    more = {"sinks": torch.tensor([1.0, 3.0, -2.0, 4.0]), "softcap": 2.0}
    kept = select_tokens(proxies, last, keys, values=values, budget=12, **more)
    refitted = refit_values(proxies, keys, values, kept, ridge=1e-6, steps=40, **more)
    plain = values.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, 24))

    def outputs(keys, values):
        rows = proxies.unflatten(1, (2, 2)).double()
        logits = 2 * torch.tanh(rows @ keys.double().unsqueeze(2).mT / 4 / 2)
        sinks = more["sinks"].double().view(1, 2, 2, 1, 1).expand(-1, -1, -1, 8, -1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ values.double().unsqueeze(2)

    full = outputs(keys, values)
    held = keys.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, 16))
    before, after = ((outputs(held, part) - full).norm() for part in (plain, refitted))
    assert after < 0.5 * before


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"softcap": 0.0}, ValueError, "softcap=0.0 must be a finite number > 0, or None"),
        ({"softcap": float("inf")}, ValueError, "softcap=inf"),
        ({"softcap": "50"}, TypeError, "softcap='50'"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks is list, must be a tensor of a floating dtype"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "sinks is torch.int64"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \(2,\), must be \(H,\)"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks is on meta, must be on cpu"),
        ({"sinks": torch.tensor([0, 0, 0, torch.nan])}, ValueError, "sinks has numbers that are not finite"),
    ],
)
def test_bad_arguments_are_named(more, error, words):
    proxies, last, keys, values = inputs()
    with pytest.raises(error, match=words):
        select_tokens(proxies, last, keys, budget=4, num_groups=2, **more)
    with pytest.raises(error, match=words):
        refit_values(proxies, keys, values, torch.arange(26, 30).expand(1, 2, -1), **more)


@pytest.mark.parametrize("model_type", models.SINKS_OR_CAPPING)
@pytest.mark.parametrize("changes", [{}, ALTERNATING], ids=["full", "alternating"])
@pytest.mark.parametrize("method", METHODS)
def test_models_decode_as_on_the_masked_full_cache(model_type, changes, method):
    model, prompts = models.sinks_or_capping_model(model_type, **changes), models.left_padded(LENGTHS)
    cache = make_cache(method, model, 10, **METHODS[method])
    found = generate(model, prompts, cache)
    kept = {layer: cache.kept_indices(layer) for layer in range(3)}
    assert [indices is not None for indices in kept.values()] == [not changes, True, not changes]
    with dropped_entries_masked(model, kept, prompts["attention_mask"].bool()):
        expected = generate(model, prompts, DynamicCache(config=model.config))
    assert found.sequences.equal(expected.sequences)
    # float32: the sums run over fewer terms, in another order
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("model_type", models.SINKS_OR_CAPPING)
@pytest.mark.parametrize("preset", ["published", "value-aware"])
def test_a_covering_budget_changes_nothing(model_type, preset):
    model, prompts = models.sinks_or_capping_model(model_type, **ALTERNATING), models.left_padded(LENGTHS)
    expected = generate(model, prompts, DynamicCache(config=model.config))
    assert_same(generate(model, prompts, ShiftKVCache(model, budget=1.0, preset=preset)), expected)


def test_of_the_heads_that_share_a_kv_head_expected_attention_counts_one_with_a_large_sink_for_less():
    model, prompts = models.sinks_or_capping_model("gpt_oss"), {"input_ids": models.prompt_ids()}
    given = []

    class Watched(ExpectedAttention):
        def score(self, layer, *arguments):
            scores = super().score(layer, *arguments)
            given.append(scores.exp() / scores.exp().sum(dim=-1, keepdim=True))
            return scores

    def scores_with(*sinks):
        for block in model.model.layers:
            block.self_attn.sinks.data = torch.tensor(sinks)
        given.clear()
        with torch.no_grad():
            model(**prompts, past_key_values=PrefillSelectionCache(model, Watched(sinks=0), 10), use_cache=True)
        return given[0]

    none = scores_with(-30.0, -30.0, -30.0, -30.0)
    first, second = scores_with(-30.0, 30.0, -30.0, 30.0), scores_with(30.0, -30.0, 30.0, -30.0)
    assert not torch.allclose(first, second, atol=1e-3)
    # All of one head, or all of the other; between them where both count alike.
    assert (none <= torch.maximum(first, second) * (1 + 1e-3) + 1e-6).all()
    assert (none >= torch.minimum(first, second) * (1 - 1e-3) - 1e-6).all()
    torch.testing.assert_close(scores_with(-30.0, 60.0, -30.0, 60.0), first, atol=1e-5, rtol=1e-3)
