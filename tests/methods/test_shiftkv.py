"""The cache against the float64 statement of the whole method, from the hidden states on."""

import numpy as np
import pytest
import torch

import method
import models
from mmshiftkv import ShiftKVCache
from shiftkv_kernels.reference import gaussian_noise


def watched_prefill(model, rotary, inputs, cache):
    """Prefills, and returns what each layer was given: hidden states by layer, the keys by layer, and the positions."""
    hidden, keys, positions, handles = {}, {}, [], []
    update = cache.update

    def keep_keys(key_states, value_states, layer_idx, *args, **kwargs):
        keys[layer_idx] = key_states
        return update(key_states, value_states, layer_idx, *args, **kwargs)

    cache.update = keep_keys
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
    return hidden, keys, positions[0]


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


def assert_selects(kept, module, config, hidden, keys, positions, valid, inverse_frequencies, axis_of):
    """Steps 1 to 6 for one row of one layer: hidden (T, d), keys (H_kv, T, D), positions (axes, T), valid (T,)."""
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
    last_query = rotated(projected(module, last), positions[:, -1:], inverse_frequencies, axis_of)
    method.assert_selects(
        kept[None],
        proxies[None],
        last_query[None],
        keys[None],
        budget=config.budget,
        num_groups=groups,
        mass=config.mass,
        scaling=module.scaling,
        valid=valid[None],
    )


def assert_agrees(model, rotary, inputs, config, axis_of):
    cache = ShiftKVCache(model, config)
    hidden, keys, positions = watched_prefill(model, rotary, inputs, cache)
    positions = positions if positions.ndim == 3 else positions[None]
    rows, tokens = inputs["input_ids"].shape
    valid = inputs.get("attention_mask", torch.ones(rows, tokens)).bool().numpy()
    modules = {
        m.layer_idx: m for m in model.modules() if getattr(m, "layer_idx", None) in hidden and hasattr(m, "q_proj")
    }
    inverse_frequencies = rotary.inv_freq.double().numpy()
    for index, module in modules.items():
        kept = cache.kept_indices(index).numpy()
        for row in range(rows):
            place = positions.expand(-1, rows, -1)[:, row].numpy()
            assert_selects(
                kept[row],
                module,
                config,
                hidden[index][row].numpy(),
                keys[index][row].double().numpy(),
                place,
                valid[row],
                inverse_frequencies,
                axis_of,
            )


@pytest.mark.parametrize("rows", [1, 2])
def test_qwen2_5_vl_with_images(vision_case, rows):
    case = vision_case("qwen2_5_vl")
    text = case.model.model.language_model
    axis_of = np.repeat([0, 1, 2], text.rotary_emb.mrope_section)
    config = ShiftKVCache(case.model, budget=30, num_proxies=64, num_groups=8).config
    assert_agrees(case.model, text.rotary_emb, case.prompts(rows), config, axis_of)


@pytest.mark.parametrize("family", ["vicuna", "mistral"])
def test_llava_next_with_images(vision_case, family):
    case = vision_case(family)
    rotary = case.model.model.language_model.rotary_emb
    config = ShiftKVCache(case.model, budget=30, num_proxies=64, stats_window=32).config
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
    ],
)
def test_text_models_and_settings(model_type, changes, settings):
    model = models.text_model(model_type, **changes)
    config = ShiftKVCache(model, **{"budget": 12, "num_proxies": 32, "num_groups": 4, **settings}).config
    rotary = model.model.rotary_emb
    axis_of = np.zeros(rotary.inv_freq.shape[0], int)
    assert_agrees(model, rotary, models.left_padded([40, 23, 7]), config, axis_of)
