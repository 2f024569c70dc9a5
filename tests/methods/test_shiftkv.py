"""The cache against the float64 statement of the whole method, from the hidden states on."""

import math

import numpy as np
import pytest
import torch

import method
import models
from mmshiftkv import ShiftKVCache
from mmshiftkv.methods.shiftkv import REFIT_STEPS
from shiftkv_kernels.reference import gaussian_noise

PRESETS = ("published", "value-aware")


def watched_prefill(model, rotary, inputs, cache):
    """Prefills, and returns what each layer had: hidden states, and keys and values, by layer; and the positions."""
    hidden, states, positions, handles = {}, {}, [], []
    update = cache.update

    def keep_states(key_states, value_states, layer_idx, *args, **kwargs):
        states[layer_idx] = key_states, value_states
        return update(key_states, value_states, layer_idx, *args, **kwargs)

    cache.update = keep_states
    for module in model.modules():
        if hasattr(module, "q_proj") and getattr(module, "layer_idx", None) is not None:
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs: hidden.update({module.layer_idx: kwargs["hidden_states"]}),
                    with_kwargs=True,
                )
            )
    handles.append(
        rotary.register_forward_pre_hook(
            lambda module, args, kwargs: positions.append(kwargs["position_ids"] if kwargs else args[1]),
            with_kwargs=True,
        )
    )
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    return hidden, states, positions[0]


def rotated(queries, positions, inverse_frequencies, axis_of):
    """Rotary embedding of (H, n, D) queries; positions (axes, n), axis_of (D / 2,) says which axis turns a pair."""
    angles = positions[axis_of].T * inverse_frequencies
    cos, sin = np.cos(np.concatenate([angles, angles], -1)), np.sin(np.concatenate([angles, angles], -1))
    first, second = np.split(queries, 2, axis=-1)
    return queries * cos + np.concatenate([-second, first], -1) * sin


def projected(module, hidden):
    """Queries (H, n, D) of (n, d) hidden states, with bias and, where there is one, the norm of each head."""
    weight = module.q_proj.weight.detach().double().numpy()
    queries = hidden @ weight.T
    if module.q_proj.bias is not None:
        queries = queries + module.q_proj.bias.detach().double().numpy()
    heads = queries.reshape(len(hidden), -1, module.head_dim).transpose(1, 0, 2)
    if hasattr(module, "q_norm"):
        scale = np.sqrt((heads**2).mean(-1, keepdims=True) + module.q_norm.variance_epsilon)
        heads = heads / scale * module.q_norm.weight.detach().double().numpy()
    return heads


def proxies_of(module, config, hidden, positions, valid, inverse_frequencies, axis_of):
    """Steps 1 to 3 for one row of one layer: proxies (H, N, D), the last query (H, 1, D), and how many groups vote.

    Of hidden states (T, d), positions (axes, T), valid (T,).
    """
    last = hidden[-1:].astype(np.float64)
    if module.layer_idx < config.last_token_layers:
        groups, stride, states = 1, 1, np.repeat(last, 16, axis=0)
    else:
        groups, stride = config.num_groups, config.future_stride or config.num_groups
        mean, deviation = method.statistics(hidden, valid, config.stats_window)
        noise = gaussian_noise(
            config.num_proxies, hidden.shape[1], seed=config.seed, stream=module.layer_idx, device=torch.device("cpu")
        )
        states = mean + config.gamma * deviation * noise.double().numpy()
    size = len(states) // groups
    steps = stride * (np.arange(len(states)) % size + 1)
    proxies = rotated(projected(module, states), positions[:, -1:] + steps, inverse_frequencies, axis_of)
    return proxies, rotated(projected(module, last), positions[:, -1:], inverse_frequencies, axis_of), groups


def logits_of(module, heads):
    """How some query heads of a module make logits."""
    sinks = getattr(module, "sinks", None)
    sinks = None if sinks is None else sinks[heads].detach().double().numpy()
    return method.Logits(module.scaling, getattr(module, "attn_logit_softcapping", None), sinks)


def assert_selects(kept, module, config, proxies, last_query, groups, keys, values, valid):
    """Steps 4 to 6, or 7 and 8, for one row of one layer: keys and values (H_kv, T, D), valid (T,)."""
    counted = {"num_groups": groups, "mass": config.mass}
    if config.score == "values":
        counted = {"values": values[None], "last_query_weight": config.last_query_weight}
    logits = logits_of(module, slice(None))
    method.assert_selects(
        kept[None],
        proxies[None],
        last_query[None],
        keys[None],
        budget=config.budget,
        scaling=logits.scaling,
        softcap=logits.softcap,
        sinks=logits.sinks,
        valid=valid[None],
        **counted,
    )


def assert_stores(stored, kept, module, config, proxies, last_query, groups, keys, values, valid):
    """Step 9 for one row of one layer: the stored values (H_kv, C, D) are those of the tokens `kept`, refitted."""
    shared = len(proxies) // len(keys)
    count = 2 ** math.ceil(math.log2(max(config.refit_queries / shared, 1)))
    for head, chosen in enumerate(kept):
        if not config.refit_queries:
            assert (stored[head] == values[head][chosen]).all()
            continue
        heads = slice(head * shared, (head + 1) * shared)
        logits = logits_of(module, heads)
        voting = groups if config.score == "votes" else None
        if method.has_sink(proxies[heads], last_query[heads], keys[head], valid, logits, voting):
            assert (stored[head] == values[head][chosen]).all()
            continue
        queries = proxies[heads, :count]
        given = (part[head].astype(np.float64) for part in (keys, values))
        refit = method.Refit.of(queries, *given, chosen.tolist(), valid, logits, config.refit_ridge)
        expected = refit.values(REFIT_STEPS)
        scale = np.abs(values[head]).max()
        np.testing.assert_allclose(stored[head], expected, rtol=0, atol=1e-3 * scale, err_msg=f"KV head {head}")
        worse = refit.error(stored[head].astype(np.float64)) - refit.error(expected)
        gained = refit.error(refit.plain) - refit.error(refit.values())
        assert worse <= 1e-4 * gained + 1e-10 * scale**2 * len(refit.missing)


def assert_agrees(model, rotary, inputs, config, axis_of):
    """The columns and values that a cache stores are those of the statement in float64."""
    cache = ShiftKVCache(model, config)
    hidden, states, positions = watched_prefill(model, rotary, inputs, cache)
    positions = positions if positions.ndim == 3 else positions[None]
    rows, tokens = inputs["input_ids"].shape
    valid = inputs.get("attention_mask", torch.ones(rows, tokens)).bool().numpy()
    modules = {
        m.layer_idx: m for m in model.modules() if getattr(m, "layer_idx", None) in hidden and hasattr(m, "q_proj")
    }
    inverse_frequencies = rotary.inv_freq.double().numpy()
    for index, module in modules.items():
        kept, stored = cache.kept_indices(index).numpy(), cache.layers[index].values.numpy()
        for row in range(rows):
            place = positions.expand(-1, rows, -1)[:, row].numpy()
            seen = hidden[index][row].numpy()
            made = proxies_of(module, config, seen, place, valid[row], inverse_frequencies, axis_of)
            given = [part[row].numpy() for part in states[index]]
            assert_selects(kept[row], module, config, *made, *given, valid[row])
            assert_stores(stored[row], kept[row], module, config, *made, *given, valid[row])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_qwen2_5_vl_with_images(vision_case, rows, preset):
    case = vision_case("qwen2_5_vl")
    text = case.model.model.language_model
    axis_of = np.repeat([0, 1, 2], text.rotary_emb.mrope_section)
    config = ShiftKVCache(case.model, budget=30, num_proxies=64, num_groups=8, preset=preset).config
    assert_agrees(case.model, text.rotary_emb, case.prompts(rows), config, axis_of)


@pytest.mark.parametrize("family", ["vicuna", "mistral"])
@pytest.mark.parametrize("preset", PRESETS)
def test_llava_next_with_images(vision_case, family, preset):
    case = vision_case(family)
    rotary = case.model.model.language_model.rotary_emb
    config = ShiftKVCache(case.model, budget=30, num_proxies=64, stats_window=32, preset=preset).config
    assert config.last_token_layers == 2
    axis_of = np.zeros(rotary.inv_freq.shape[0], int)
    assert_agrees(case.model, rotary, case.prompts(2), config, axis_of)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 40}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": 0.0},
        {"gamma": 1.0, "future_stride": 1},
        {"stats_window": 9, "seed": 3},
        {"mass": 0.5, "num_groups": 2},
        {"last_token_layers": 1},
        {"score": "values"},
        {"score": "values", "last_query_weight": 4.0, "refit_queries": 24},
        {"score": "values", "last_query_weight": 0.0, "refit_queries": 512, "refit_ridge": 0.3, "last_token_layers": 1},
        {"score": "values", "gamma": 1.0, "stats_window": 9, "refit_queries": 1},
        {"refit_queries": 32},
    ],
)
def test_text_models_and_settings(model_type, changes, settings):
    model = models.text_model(model_type, **changes)
    config = ShiftKVCache(model, **{"budget": 12, "num_proxies": 32, "num_groups": 4, **settings}).config
    rotary = model.model.rotary_emb
    axis_of = np.zeros(rotary.inv_freq.shape[0], int)
    assert_agrees(model, rotary, models.left_padded([40, 23, 7]), config, axis_of)


@pytest.mark.parametrize("model_type", models.SINKS_OR_CAPPING)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mass": 0.5, "num_groups": 2, "refit_queries": 32},
        {"score": "values", "last_query_weight": 4.0, "refit_queries": 24},
    ],
)
def test_models_with_learned_sinks_or_capped_logits(model_type, settings):
    model = models.sinks_or_capping_model(model_type)
    config = ShiftKVCache(model, **{"budget": 12, "num_proxies": 32, "num_groups": 4, "gamma": 2.0, **settings}).config
    rotary = model.model.rotary_emb
    axis_of = np.zeros(rotary.inv_freq.shape[0], int)
    assert_agrees(model, rotary, models.left_padded([40, 23, 7]), config, axis_of)
