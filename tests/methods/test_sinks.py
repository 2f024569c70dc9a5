"""Attention sinks: tokens with a short value that get most of the attention, as the first tokens of real models do.

The embedded model has none, so they are constructed: once as queries, keys and values, and once as weights of a model.
"""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

import models
from mmshiftkv import PrefillSelectionCache, ShiftKVConfig, refit_values, select_tokens
from mmshiftkv.methods.shiftkv import ShiftKV

MASSES = (0.5, 0.8, 0.95)
PLACES = ((0,), (17,))
SEVERAL = (0, 1, 23)
BUDGETS = (4, 8, 16, 32)
GROUPS = 16
LAST_QUERY_WEIGHT = 4.0
COUNTED = {"score": "values", "last_query_weight": LAST_QUERY_WEIGHT}


def attention(queries, keys):
    """(B, H_kv, rows, T): the rows of the query heads that share a KV head."""
    rows = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    return (rows @ keys.mT * keys.shape[-1] ** -0.5).softmax(dim=-1)


def mass_on(places, queries, keys):
    """(B, H_kv): the mean mass of the queries on all of these tokens together."""
    return attention(queries, keys)[..., list(places)].sum(dim=-1).mean(dim=-1)


def taken(states, kept):
    return states.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))


def error(queries, keys, values, kept_keys, kept_values):
    """How far the outputs from what is kept are from those of everything, relative to these."""
    full = attention(queries, keys) @ values
    return ((attention(queries, kept_keys) @ kept_values - full).norm() / full.norm()).item()


def are_kept(places, kept):
    return all((kept == place).any(dim=-1).all() for place in places)


class Sinks:
    """Keys and values of 64 tokens, and queries that give `mass` of their attention to the sinks at `places` together.

    Args:
        alike: the queries of a head prefer the same tokens besides; else each prefers others.
    """

    def __init__(self, places, mass, alike):
        generator = torch.Generator().manual_seed(len(places) * 100 + int(mass * 100))
        self.alike, sinks = alike, list(places)
        self.keys = torch.randn(1, 2, 64, 32, generator=generator)
        lengths = torch.rand(1, 2, 64, 1, generator=generator) + 0.5
        self.values = torch.randn(self.keys.shape, generator=generator) * lengths
        self.values[:, :, sinks] *= 0.001
        # A direction of their own: all queries are alike in it, and other tokens have nothing there.
        self.keys[..., 0] = 0
        self.keys[:, :, sinks] = 0
        low, high = 0.0, 100.0
        for _ in range(30):
            middle = self.keys[:, :, sinks, 0] = (low + high) / 2
            is_less = mass_on(places, self.queries(128, seed=0), self.keys).mean() < mass
            low, high = (middle, high) if is_less else (low, middle)

    def queries(self, count, seed):
        """(1, 6, count, 32)."""
        preferred = torch.randn(1, 6, 1, 32, generator=torch.Generator().manual_seed(4321))
        queries = torch.randn(1, 6, count, 32, generator=torch.Generator().manual_seed(seed))
        if self.alike:
            queries += 1.5 * preferred
        queries[..., 0] = 4.0
        return queries


def selections(sinks, budget):
    """What the published selection and that by values keep, and the latter's values refitted."""
    proxies, last = sinks.queries(128, seed=0), sinks.queries(1, seed=1)
    given = {"budget": budget, "last_query_weight": LAST_QUERY_WEIGHT}
    published = select_tokens(proxies, last, sinks.keys, budget=budget, num_groups=GROUPS)
    kept = select_tokens(proxies, last, sinks.keys, values=sinks.values, **given)
    return published, kept, refit_values(proxies, sinks.keys, sinks.values, kept)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_a_sink_is_kept_which_a_weight_by_length_alone_would_drop(places, mass, alike):
    sinks = Sinks(places, mass, alike)
    proxies, last = sinks.queries(128, seed=0), sinks.queries(1, seed=1)
    for queries in (proxies, sinks.queries(128, seed=2)):
        torch.testing.assert_close(mass_on(places, queries, sinks.keys), torch.full((1, 2), mass), atol=0.03, rtol=0)
    for budget in BUDGETS:
        assert are_kept(places, selections(sinks, budget)[1])
    shares = attention(proxies, sinks.keys).mean(dim=2) + attention(last, sinks.keys).mean(dim=2)
    by_length = shares * sinks.values.norm(dim=-1)
    assert not (by_length.topk(3).indices == places[0]).any()


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_with_a_sink_outputs_are_as_near_as_the_published_ones_and_with_a_refit_nearer(places, mass, alike):
    sinks = Sinks(places, mass, alike)
    keys, values, fresh = sinks.keys, sinks.values, sinks.queries(128, seed=2)
    for budget in BUDGETS:
        published, kept, refitted = selections(sinks, budget)
        before, plain = (
            error(fresh, keys, values, taken(keys, part), taken(values, part)) for part in (published, kept)
        )
        after = error(fresh, keys, values, taken(keys, kept), refitted)
        # One last query, which counts as much as four times all proxies, is one of many that may come.
        assert plain < 1.2 * before
        assert after < before
        assert after < 0.95 * plain


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("mass", MASSES)
def test_several_sinks_are_kept_together(mass, alike):
    sinks = Sinks(SEVERAL, mass, alike)
    fresh, keys, values = sinks.queries(128, seed=2), sinks.keys, sinks.values
    for budget in BUDGETS:
        published, kept, _ = selections(sinks, budget)
        assert are_kept(SEVERAL, kept)
        before, plain = (
            error(fresh, keys, values, taken(keys, part), taken(values, part)) for part in (published, kept)
        )
        assert plain < 1.2 * before


SINK, FEATURE = 3, 63  # the token, and the feature of hidden states that it has to itself
PAIR = [7, 15]  # the features of a head that rotation turns least


class Watched(ShiftKV):
    """Remembers the proxies of each layer."""

    def prepare(self, layer, summary, valid):
        proxies = super().prepare(layer, summary, valid)
        self.__dict__.setdefault("proxies", {})[layer.index] = proxies.queries
        return proxies


def prefilled(model, ids, cache):
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


def compressed(model, ids, budget, **settings):
    """A cache with the prompt, and the proxies that scored it by layer."""
    method = Watched(ShiftKVConfig(budget=budget, num_proxies=128, num_groups=GROUPS, **settings))
    return prefilled(model, ids, PrefillSelectionCache(model, method, budget)), method.proxies


def prompt_with_sinks(places):
    ids = models.prompt_ids(1, 64, seed=1).clamp(min=SINK + 1)
    ids[:, list(places)] = SINK
    return ids


def model_with_sinks(places, mass, ids, spread):
    """A Qwen 2 all of whose heads' proxies give SINK tokens `mass` of their attention; these have no value.

    It is as in real models: one feature of the token is so large that the norm leaves nothing of the others, keys read
    it, and all queries ask for it, by their bias.

    Args:
        spread: of the weights; the smaller, the less do logits of other tokens vary.
    """
    rope = {"rope_type": "default", "rope_theta": 1e8}
    model = models.text_model("qwen2", initializer_range=spread, rope_parameters=rope)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, FEATURE] = 0
        model.model.embed_tokens.weight[SINK] = 0
        model.model.embed_tokens.weight[SINK, FEATURE] = 1000
        for block in model.model.layers:
            attn, mlp = block.self_attn, block.mlp
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj):
                projection.weight[:, FEATURE] = 0
            attn.o_proj.weight[FEATURE] = mlp.down_proj.weight[FEATURE] = 0
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj):
                projection.bias.zero_()
            for projection in (attn.q_proj, attn.k_proj):
                projection.weight.unflatten(0, (-1, 16))[:, PAIR] = 0
            attn.k_proj.weight.unflatten(0, (-1, 16))[:, PAIR[0], FEATURE] = 1
    for _ in range(6):
        full = prefilled(model, ids, DynamicCache(config=model.config))
        _, proxies = compressed(model, ids, budget=4)
        for layer, block in enumerate(model.model.layers):
            shares = attention(proxies[layer], full.layers[layer].keys)[..., list(places)].sum(dim=-1)
            shares = shares.unflatten(2, (2, -1)).mean(dim=-1).flatten()  # of each query head
            # The norm makes 8 of the feature.
            missing = (torch.tensor(mass).logit() - shares.logit()) / (8 * 16**-0.5)
            block.self_attn.q_proj.bias.data.unflatten(0, (-1, 16))[:, PAIR[0]] += missing
    return model


def next_queries(model, full, ids):
    """The queries of tokens behind the prompt, by layer."""
    queries, handles = {}, []

    def remember(module, args, kwargs):
        projected = module.q_proj(kwargs["hidden_states"]).unflatten(-1, (-1, 16)).transpose(1, 2)
        queries[module.layer_idx] = apply_rotary_pos_emb(projected, projected, *kwargs["position_embeddings"])[0]

    for block in model.model.layers:
        handles.append(block.self_attn.register_forward_pre_hook(remember, with_kwargs=True))
    prefilled(model, ids, copy.deepcopy(full))
    for handle in handles:
        handle.remove()
    return queries


def errors(queries, full, caches):
    """By cache: how far the outputs of all layers are off, relative to them, on average."""
    found = []
    for cache in caches:
        layers = zip(full.layers, cache.layers, strict=True)
        each = [
            error(queries[index], whole.keys, whole.values, held.keys, held.values)
            for index, (whole, held) in enumerate(layers)
        ]
        found.append(sum(each) / len(each))
    return found


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("places", [*PLACES, SEVERAL], ids=str)
def test_a_model_keeps_its_sinks(places, mass):
    ids = prompt_with_sinks(places)
    model = model_with_sinks(places, mass, ids, spread=0.06)
    full = prefilled(model, ids, DynamicCache(config=model.config))
    _, proxies = compressed(model, ids, budget=4)
    for index, layer in enumerate(full.layers):
        found = mass_on(places, proxies[index], layer.keys)
        torch.testing.assert_close(found, torch.full_like(found, mass), atol=0.01, rtol=0)
        lengths = layer.values.norm(dim=-1)
        assert lengths[..., list(places)].max() < 1e-3 * lengths.mean()
    for budget in BUDGETS:
        cache, _ = compressed(model, ids, budget, **COUNTED)
        for index in range(3):
            assert are_kept(places, cache.kept_indices(index))


@pytest.mark.parametrize("spread", [0.03, 0.06], ids=["as proxies do", "more than proxies do"])
@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("places", [*PLACES, SEVERAL], ids=str)
def test_heads_with_sinks_keep_their_values_however_much_a_models_queries_attend_to_them(places, mass, spread):
    ids = prompt_with_sinks(places)
    model = model_with_sinks(places, mass, ids, spread)
    full = prefilled(model, ids, DynamicCache(config=model.config))
    own = next_queries(model, full, models.prompt_ids(1, 8, seed=5).clamp(min=SINK + 1))
    for budget in BUDGETS[1:]:
        settings = ({}, COUNTED, {**COUNTED, "refit_queries": 512}, {"refit_queries": 512})
        published, plain, *refitted = (compressed(model, ids, budget, **each)[0] for each in settings)
        # A refit would give the sinks what is missing, and these queries up to 8 times their output.
        for same, other in zip(refitted, (plain, published), strict=True):
            for mine, theirs in zip(same.layers, other.layers, strict=True):
                assert mine.values.equal(theirs.values)
        before, after = errors(own, full, (published, plain))
        assert after < 1.15 * before
