"""The public operations: arguments are checked here, and the Triton kernel or the reference is chosen.

What an operation computes is written at its namesake in `reference`.  Each takes that one's arguments and, besides,

    backend: "auto" (the Triton kernel for tensors on a GPU, the reference elsewhere), "triton" or "torch",

and raises ValueError for tensors that do not fit together, values out of range, and a backend that cannot run.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from . import reference, required
from .checks import (
    checked_once,
)
from .device import is_interpreted, no_product_of, takes_triton

_LARGEST_HEAD_DIM = 256


@functools.cache
def _fused(name: str, module: str | None = None) -> Callable[..., Any]:
    """A kernel's function, imported when it is first used: not every platform has Triton."""
    return getattr(importlib.import_module(f"{__package__}.fused.{module or name}"), name)


@checked_once(required.of_token_statistics)
def token_statistics(
    hidden_states: torch.Tensor, *, last: torch.Tensor | None = None, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each token's features and their summed squared deviation: two (B, t) of (B, t, d).

    The last token's states are copied to `last`, (B, 1, d), if that is given.
    """
    if takes_triton(backend, hidden_states.device):
        return _fused("token_statistics")(hidden_states, last)
    return reference.token_statistics(hidden_states, last)


@checked_once(required.of_draw_samples)
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
        return _fused("draw_samples", "samples")(means, squares, **arguments)
    return reference.draw_samples(means, squares, **arguments)


@checked_once(required.of_rotate_queries)
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
    if takes_triton(backend, proxy_queries.device):
        return _fused("rotate_queries", "rotation")(proxy_queries, last_query, cos, sin, step_cos, step_sin)
    return reference.rotate_queries(proxy_queries, last_query, cos, sin, step_cos, step_sin)


@checked_once(required.of_group_mass)
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
    logits = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    arguments: dict[str, Any] = {"num_groups": num_groups, **logits, "valid": valid}
    if takes_triton(backend, keys.device, unless=_no_product(keys)):
        return _fused("group_mass")(proxy_queries, last_query, keys, **arguments)
    return reference.group_mass(proxy_queries, last_query, keys, **arguments)


@checked_once(required.of_value_scores)
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
    has_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """What each token gives to the output of proxies (B, H, N, D) and last query (B, H, 1, D): (B, H_kv, T).

    `has_sink`, (B, H_kv) bool, is set to whether any of a KV head's tokens is an attention sink.
    """
    logits = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    arguments: dict[str, Any] = {**logits, "last_weight": last_weight, "valid": valid, "has_sink": has_sink}
    if takes_triton(backend, keys.device, unless=_no_product(keys, values)):
        return _fused("value_scores")(proxy_queries, last_query, keys, values, **arguments)
    return reference.value_scores(proxy_queries, last_query, keys, values, **arguments)


@checked_once(required.of_attend)
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
    logits: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    if takes_triton(backend, keys.device, unless=_no_product(keys, values)):
        return _fused("attend")(queries, keys, values, **logits, valid=valid)
    return reference.attend(queries, keys, values, **logits, valid=valid)


@checked_once(required.of_refit_values)
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
    unchanged: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Values (B, H_kv, C, D_v) of the tokens `kept` with which these give queries what the whole prompt gave them.

    KV heads that `unchanged`, (B, H_kv) bool, names keep their values.
    """
    logits = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    arguments: dict[str, Any] = {**logits, "ridge": ridge, "steps": steps, "valid": valid, "unchanged": unchanged}
    if takes_triton(backend, keys.device, unless=_no_product(keys, values)):
        return _fused("refit_values")(queries, outputs, keys, values, kept, **arguments)
    return reference.refit_values(queries, outputs, keys, values, kept, **arguments)


@checked_once(required.of_vote)
def vote(
    mass: torch.Tensor, threshold: float, last_mass: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """How many of the groups need each token to reach `threshold` of their mass: (B, H_kv, T) of (B, H_kv, G, T).

    `last_mass`, (B, H_kv, T), is added to that.

    The kernel rounds sums of masses otherwise than the reference: where rounding decides whether a group's share is
    reached at one token or only at the next, the group may cast a vote more or less.
    """
    if takes_triton(backend, mass.device):
        return _fused("vote")(mass, threshold, last_mass)
    return reference.vote(mass, threshold, last_mass)


@checked_once(required.of_keep_best)
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
    if takes_triton(backend, scores.device):
        return _fused("keep_best")(scores, count, valid, not_finite=not_finite)
    return reference.keep_best(scores, count, valid, not_finite=not_finite)


@checked_once(required.of_gather)
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
    if takes_triton(backend, keys.device):
        return _fused("gather")(keys, values, indices, out=out, valid=valid, not_finite=not_finite)
    return reference.gather(keys, values, indices, out=out, valid=valid, not_finite=not_finite)


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
