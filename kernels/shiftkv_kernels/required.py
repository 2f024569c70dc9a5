"""What each operation requires of its arguments; a ValueError, or a TypeError, says what is wrong."""

import math

import torch

from .checks import (
    check_alike,
    check_contiguous,
    check_device,
    check_dtype,
    check_flag,
    check_logits,
    check_out,
    check_positive,
    check_shape,
    check_valid,
)

_LARGEST_SEED = 2**32 - 1


def of_token_statistics(hidden_states: torch.Tensor, *, last: torch.Tensor | None = None) -> None:
    """Checks the arguments of `token_statistics`."""
    check_shape("hidden_states", hidden_states, "(B, t, d)", (None, None, None))
    if last is not None:
        check_shape("last", last, "(B, 1, d)", (hidden_states.shape[0], 1, hidden_states.shape[2]))
        check_alike("last", last, "hidden_states", hidden_states)


def of_draw_samples(
    means: torch.Tensor,
    squares: torch.Tensor,
    *,
    count: int,
    features: int,
    gamma: float,
    seed: int,
    stream: int,
    dtype: torch.dtype,
    valid: torch.Tensor | None = None,
    window: int | None = None,
    last: torch.Tensor | None = None,
) -> None:
    """Checks the arguments of `draw_samples`."""
    check_shape("means", means, "(B, T)", (None, None))
    check_shape("squares", squares, "(B, T)", means.shape)
    check_dtype("means", means, torch.float32)
    check_dtype("squares", squares, torch.float32)
    check_device("squares", squares, "means", means)
    check_valid(valid, "means", means, *means.shape)
    for name, value in (("count", count), ("features", features), ("window", 1 if window is None else window)):
        check_positive(name, value)
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value <= _LARGEST_SEED:
            raise ValueError(f"{name}={value!r} must be from 0 to {_LARGEST_SEED}")
    if last is not None:
        check_shape("last", last, "(B, 1, d)", (means.shape[0], 1, features))
        check_dtype("last", last, dtype)
        check_device("last", last, "means", means)


def of_rotate_queries(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    step_cos: torch.Tensor,
    step_sin: torch.Tensor,
) -> None:
    """Checks the arguments of `rotate_queries`."""
    batch, _, _, head_dim = _check_queries(proxy_queries, last_query)
    rotated = cos.shape[-1]
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise ValueError(f"cos has {rotated} features, must have an even number, at most the {head_dim} of the queries")
    check_shape("cos", cos, "(B or 1, 1, rotary dim)", (batch if cos.shape[0] != 1 else 1, 1, rotated))
    check_shape("sin", sin, "the shape of cos", cos.shape)
    check_shape("step_cos", step_cos, "(g, rotary dim)", (None, rotated))
    check_shape("step_sin", step_sin, "the shape of step_cos", step_cos.shape)
    for name, tensor in (("cos", cos), ("sin", sin), ("step_cos", step_cos), ("step_sin", step_sin)):
        check_device(name, tensor, "proxy_queries", proxy_queries)


def of_group_mass(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    *,
    num_groups: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> None:
    """Checks the arguments of `group_mass`."""
    proxies = _check_queries(proxy_queries, last_query)[2]
    _check_prompt(proxy_queries, keys, None, valid)
    if num_groups < 1 or proxies == 0 or proxies % num_groups:
        raise ValueError(f"num_groups={num_groups!r} must be a divisor of the {proxies} proxies in proxy_queries")
    check_logits("proxy_queries", proxy_queries, scaling, softcap, sinks)


def of_value_scores(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    last_weight: float = 1.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    has_sink: torch.Tensor | None = None,
) -> None:
    """Checks the arguments of `value_scores`."""
    if _check_queries(proxy_queries, last_query)[2] == 0:
        raise ValueError("proxy_queries has no proxies, must have at least 1")
    _check_prompt(proxy_queries, keys, values, valid)
    check_logits("proxy_queries", proxy_queries, scaling, softcap, sinks)
    if not 0 <= last_weight < math.inf:
        raise ValueError(f"last_weight={last_weight!r} must be at least 0, and finite")
    _check_heads("has_sink", has_sink, keys)


def of_attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> None:
    """Checks the arguments of `attend`."""
    check_shape("queries", queries, "(B, H, n, D)", (None, None, None, None))
    _check_prompt(queries, keys, values, valid, "queries")
    check_logits("queries", queries, scaling, softcap, sinks)


def of_refit_values(
    queries: torch.Tensor,
    outputs: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    *,
    scaling: float,
    ridge: float,
    steps: int,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    unchanged: torch.Tensor | None = None,
) -> None:
    """Checks the arguments of `refit_values`."""
    of_attend(queries, keys, values, scaling=scaling, softcap=softcap, sinks=sinks, valid=valid)
    check_shape("outputs", outputs, "(B, H, n, D_v)", (*queries.shape[:3], values.shape[3]))
    check_dtype("outputs", outputs, torch.float32)
    check_device("outputs", outputs, "queries", queries)
    check_shape("kept", kept, "(B, H_kv, C)", (*keys.shape[:2], None))
    check_dtype("kept", kept, torch.int64)
    check_device("kept", kept, "keys", keys)
    check_positive("ridge", ridge)
    check_positive("steps", steps)
    _check_heads("unchanged", unchanged, keys)


def of_vote(mass: torch.Tensor, threshold: float, last_mass: torch.Tensor | None = None) -> None:
    """Checks the arguments of `vote`."""
    check_shape("mass", mass, "(B, H_kv, G, T)", (None, None, None, None))
    check_dtype("mass", mass, torch.float32)
    check_positive("threshold", threshold, most=1)
    if last_mass is not None:
        check_shape("last_mass", last_mass, "(B, H_kv, T)", (*mass.shape[:2], mass.shape[3]))
        check_dtype("last_mass", last_mass, torch.float32)
        check_device("last_mass", last_mass, "mass", mass)


def of_keep_best(
    scores: torch.Tensor,
    count: int,
    valid: torch.Tensor | None = None,
    *,
    not_finite: torch.Tensor | None = None,
) -> None:
    """Checks the arguments of `keep_best`."""
    check_shape("scores", scores, "(B, H_kv, T)", (None, None, None))
    check_dtype("scores", scores, torch.float32)
    check_valid(valid, "scores", scores, scores.shape[0], scores.shape[2])
    if not 1 <= count <= scores.shape[2]:
        raise ValueError(f"count={count!r} must be from 1 to the {scores.shape[2]} tokens of scores")
    check_flag(not_finite, "scores", scores)


def of_gather(
    keys: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    valid: torch.Tensor | None = None,
    not_finite: torch.Tensor | None = None,
) -> None:
    """Checks the arguments of `gather`."""
    check_shape("keys", keys, "(B, H_kv, T, D)", (None, None, None, None))
    check_shape("values", values, "(B, H_kv, T, D_v)", (*keys.shape[:3], None))
    check_shape("indices", indices, "(B, H_kv, C)", (*keys.shape[:2], None))
    check_dtype("indices", indices, torch.int64)
    check_device("values", values, "keys", keys)
    check_device("indices", indices, "keys", keys)
    if out is not None:
        check_out(out, keys, values, indices.shape[2])
    check_valid(valid, "keys", keys, keys.shape[0], keys.shape[2])
    check_flag(not_finite, "keys", keys)


def _check_heads(name: str, flags: torch.Tensor | None, keys: torch.Tensor) -> None:
    """Raises ValueError unless `flags` is None or says something of each KV head of the keys."""
    if flags is not None:
        check_shape(name, flags, "(B, H_kv)", keys.shape[:2])
        check_dtype(name, flags, torch.bool)
        check_device(name, flags, "keys", keys)
        check_contiguous(name, flags)


def _check_queries(proxy_queries: torch.Tensor, last_query: torch.Tensor) -> torch.Size:
    check_shape("proxy_queries", proxy_queries, "(B, H, N, D)", (None, None, None, None))
    batch, heads, _, head_dim = proxy_queries.shape
    check_shape("last_query", last_query, "(B, H, 1, D)", (batch, heads, 1, head_dim))
    check_dtype("last_query", last_query, proxy_queries.dtype)
    check_device("last_query", last_query, "proxy_queries", proxy_queries)
    return proxy_queries.shape


def _check_prompt(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    valid: torch.Tensor | None,
    name: str = "proxy_queries",
) -> None:
    """Raises ValueError unless the prompt's keys, values and padding fit together and to the queries `name`."""
    batch, heads, _, head_dim = queries.shape
    check_shape("keys", keys, "(B, H_kv, T, D)", (batch, None, None, head_dim))
    check_dtype("keys", keys, queries.dtype)
    check_device("keys", keys, name, queries)
    kv_heads, tokens = keys.shape[1:3]
    if values is not None:
        check_shape("values", values, "(B, H_kv, T, D_v)", (*keys.shape[:3], None))
        check_dtype("values", values, keys.dtype)
        check_device("values", values, "keys", keys)
    check_valid(valid, "keys", keys, batch, tokens)
    if tokens == 0:
        raise ValueError("keys has no tokens, must have at least 1")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"keys has {kv_heads} heads, must have a divisor of the {heads} heads of {name}")
