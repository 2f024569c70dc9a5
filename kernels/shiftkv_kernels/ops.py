"""The public operations: arguments are checked here, and the Triton kernel or the reference is chosen.

What an operation computes is written at its namesake in `reference`.  Each takes that one's arguments and, besides,

    backend: "auto" (the Triton kernel for tensors on a GPU, the reference elsewhere), "triton" or "torch",

and raises ValueError for tensors that do not fit together, values out of range, and a backend that cannot run.
"""

import math
from typing import Any

import torch

from . import reference
from .checks import (
    check_device,
    check_dtype,
    check_flag,
    check_out,
    check_positive,
    check_shape,
    check_valid,
    checked_logits,
)
from .device import is_interpreted, no_product_of, takes_triton

_LARGEST_HEAD_DIM = 256
_LARGEST_SEED = 2**32 - 1


def token_statistics(hidden_states: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each token's features and their summed squared deviation: two (B, t) of (B, t, d)."""
    check_shape("hidden_states", hidden_states, "(B, t, d)", (None, None, None))
    if takes_triton(backend, hidden_states.device):
        from .fused.token_statistics import token_statistics as fused

        return fused(hidden_states)
    return reference.token_statistics(hidden_states)


def draw_samples(
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
    backend: str = "auto",
) -> torch.Tensor:
    """Samples (B, N, d) with the mean of a prompt, of its (B, T) token statistics, and `gamma` times its deviation.

    With `last`, (B, 1, d), this state follows them.
    """
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
    arguments: dict[str, Any] = {
        "count": count,
        "features": features,
        "gamma": gamma,
        "seed": seed,
        "stream": stream,
        "dtype": dtype,
        "valid": valid,
        "window": window,
        "last": last,
    }
    if takes_triton(backend, means.device):
        from .fused.samples import draw_samples as fused

        return fused(means, squares, **arguments)
    return reference.draw_samples(means, squares, **arguments)


def rotate_queries(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    step_cos: torch.Tensor,
    step_sin: torch.Tensor,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies (B, H, N, D) rotated to positions after the prompt, and last queries (B, H, 1, D) to their own."""
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
    if takes_triton(backend, proxy_queries.device):
        from .fused.rotation import rotate_queries as fused

        return fused(proxy_queries, last_query, cos, sin, step_cos, step_sin)
    return reference.rotate_queries(proxy_queries, last_query, cos, sin, step_cos, step_sin)


def group_mass(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    *,
    num_groups: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass of each group, (B, H_kv, G, T), and of the last query, (B, H_kv, T), on every token."""
    proxies = _check_queries(proxy_queries, last_query)[2]
    _check_prompt(proxy_queries, keys, None, valid)
    if num_groups < 1 or proxies == 0 or proxies % num_groups:
        raise ValueError(f"num_groups={num_groups!r} must be a divisor of the {proxies} proxies in proxy_queries")
    logits = checked_logits("proxy_queries", proxy_queries, scaling, softcap, sinks)
    arguments: dict[str, Any] = {"num_groups": num_groups, **logits, "valid": valid}
    if takes_triton(backend, keys.device, unless=_no_product(keys)):
        from .fused.group_mass import group_mass as fused

        return fused(proxy_queries, last_query, keys, **arguments)
    return reference.group_mass(proxy_queries, last_query, keys, **arguments)


def value_scores(
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
    backend: str = "auto",
) -> torch.Tensor:
    """What each token gives to the output of proxies (B, H, N, D) and last query (B, H, 1, D): (B, H_kv, T)."""
    if _check_queries(proxy_queries, last_query)[2] == 0:
        raise ValueError("proxy_queries has no proxies, must have at least 1")
    _check_prompt(proxy_queries, keys, values, valid)
    logits = checked_logits("proxy_queries", proxy_queries, scaling, softcap, sinks)
    if not 0 <= last_weight < math.inf:
        raise ValueError(f"last_weight={last_weight!r} must be at least 0, and finite")
    arguments: dict[str, Any] = {**logits, "last_weight": last_weight, "valid": valid}
    if takes_triton(backend, keys.device, unless=_no_product(keys, values)):
        from .fused.value_scores import value_scores as fused

        return fused(proxy_queries, last_query, keys, values, **arguments)
    return reference.value_scores(proxy_queries, last_query, keys, values, **arguments)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """What queries (B, H, n, D) behind a prompt get from it: (B, H, n, D_v) float32."""
    check_shape("queries", queries, "(B, H, n, D)", (None, None, None, None))
    _check_prompt(queries, keys, values, valid, "queries")
    logits = checked_logits("queries", queries, scaling, softcap, sinks)
    if takes_triton(backend, keys.device, unless=_no_product(keys, values)):
        from .fused.attend import attend as fused

        return fused(queries, keys, values, **logits, valid=valid)
    return reference.attend(queries, keys, values, **logits, valid=valid)


def refit_values(
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
    backend: str = "auto",
) -> torch.Tensor:
    """Values (B, H_kv, C, D_v) of the tokens `kept` with which these give queries what the whole prompt gave them."""
    check_shape("queries", queries, "(B, H, n, D)", (None, None, None, None))
    _check_prompt(queries, keys, values, valid, "queries")
    check_shape("outputs", outputs, "(B, H, n, D_v)", (*queries.shape[:3], values.shape[3]))
    check_dtype("outputs", outputs, torch.float32)
    check_device("outputs", outputs, "queries", queries)
    check_shape("kept", kept, "(B, H_kv, C)", (*keys.shape[:2], None))
    check_dtype("kept", kept, torch.int64)
    check_device("kept", kept, "keys", keys)
    logits = checked_logits("queries", queries, scaling, softcap, sinks)
    check_positive("ridge", ridge)
    check_positive("steps", steps)
    arguments: dict[str, Any] = {**logits, "ridge": ridge, "steps": steps, "valid": valid}
    if takes_triton(backend, keys.device, unless=_no_product(keys, values)):
        from .fused.refit_values import refit_values as fused

        return fused(queries, outputs, keys, values, kept, **arguments)
    return reference.refit_values(queries, outputs, keys, values, kept, **arguments)


def vote(mass: torch.Tensor, threshold: float, *, backend: str = "auto") -> torch.Tensor:
    """How many of the groups need each token to reach `threshold` of their mass: (B, H_kv, T) of (B, H_kv, G, T).

    The kernel rounds sums of masses otherwise than the reference: where rounding decides whether a group's share is
    reached at one token or only at the next, the group may cast a vote more or less.
    """
    check_shape("mass", mass, "(B, H_kv, G, T)", (None, None, None, None))
    check_dtype("mass", mass, torch.float32)
    check_positive("threshold", threshold, most=1)
    if takes_triton(backend, mass.device):
        from .fused.vote import vote as fused

        return fused(mass, threshold)
    return reference.vote(mass, threshold)


def keep_best(
    scores: torch.Tensor,
    count: int,
    valid: torch.Tensor | None = None,
    *,
    not_finite: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The last token and the `count` - 1 others with the highest scores, (B, H_kv, count) int64, ascending.

    Where a score is not finite, `not_finite` (1,) is set to True.
    """
    check_shape("scores", scores, "(B, H_kv, T)", (None, None, None))
    check_dtype("scores", scores, torch.float32)
    check_valid(valid, "scores", scores, scores.shape[0], scores.shape[2])
    if not 1 <= count <= scores.shape[2]:
        raise ValueError(f"count={count!r} must be from 1 to the {scores.shape[2]} tokens of scores")
    check_flag(not_finite, "scores", scores)
    if takes_triton(backend, scores.device):
        from .fused.keep_best import keep_best as fused

        return fused(scores, count, valid, not_finite=not_finite)
    return reference.keep_best(scores, count, valid, not_finite=not_finite)


def gather(
    keys: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    valid: torch.Tensor | None = None,
    not_finite: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of the tokens `indices`, (B, H_kv, C), in the first of the S slots of `out`; then zeros.

    Without `out` they come in new storage of C slots.  Numbers that are not finite become 0, and where a token that is
    no padding has some, `not_finite` (1,) is set to True.  TypeError if `out` is not a tuple of two tensors.
    """
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
    if takes_triton(backend, keys.device):
        from .fused.gather import gather as fused

        return fused(keys, values, indices, out=out, valid=valid, not_finite=not_finite)
    return reference.gather(keys, values, indices, out=out, valid=valid, not_finite=not_finite)


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


def _no_product(keys: torch.Tensor, values: torch.Tensor | None = None) -> str | None:
    """Why the kernels cannot multiply these keys and values, if they cannot."""
    if reason := no_product_of(keys.dtype):
        return reason
    largest = keys.shape[-1] if values is None else max(keys.shape[-1], values.shape[-1])
    if largest > _LARGEST_HEAD_DIM:
        return f"a head dim of {largest} is more than {_LARGEST_HEAD_DIM}"
    if keys.dtype == torch.bfloat16 and is_interpreted():
        return "Triton's interpreter cannot multiply bfloat16"
    return None
