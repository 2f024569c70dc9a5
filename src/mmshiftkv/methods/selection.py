"""The selection as functions of queries, keys and values, for use without a cache."""

import math
from typing import Any

import torch

from shiftkv_kernels import attend, group_mass, keep_best, value_scores, vote
from shiftkv_kernels import refit_values as refit_to_outputs

from ..checks import BACKENDS, check_choice, check_integer, check_real
from ..model.padding import check_left_padding
from .config import check_mass
from .shiftkv import REFIT_STEPS


def select_tokens(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    *,
    budget: int,
    num_groups: int | None = None,
    mass: float = 0.95,
    values: torch.Tensor | None = None,
    last_query_weight: float = 1.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The prompt tokens that MM-ShiftKV keeps (method, steps 4 to 6; with `values`, steps 7 and 8).

    Args:
        proxy_queries: (B, H, N, D), rotated; the proxies of one group are neighbours.
        last_query: (B, H, 1, D), the rotated query of the last prompt token.
        keys: (B, H_kv, T, D), rotated; H a multiple of H_kv.
        budget: tokens kept per KV head.
        num_groups: groups of proxies that vote, a divisor of N; with `values` nothing votes, and none are needed.
        mass: share of a group's attention mass that its votes must hold, in (0, 1].
        values: (B, H_kv, T, D_v): tokens count by what they give to the outputs, instead of by votes.
        last_query_weight: with `values`, factor on what a token gives to the last query, >= 0.
        scaling: factor on the logits; None: D ** -0.5.
        softcap: logits x become softcap * tanh(x / softcap), as in Gemma 2, > 0; None: they are not capped.
        sinks: (H,) floating, finite: logits of query heads that take mass and give nothing, as in gpt-oss; None: none.
        valid: (B, T) bool, False for padding, which must be on the left; None: no padding.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, H_kv, min(budget, T)) int64, ascending, the last token always included.  A row with fewer valid tokens than
        the budget keeps all of them and its last padding columns.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; the message names it.
    """
    check_integer("budget", budget, minimum=1)
    if values is None and num_groups is None:
        raise TypeError("num_groups is missing: how many groups of proxies vote; without votes give values")
    check_choice("backend", backend, BACKENDS)
    check_mass(mass)
    check_real("last_query_weight", last_query_weight, lambda weight: 0 <= weight < math.inf, "a finite number >= 0")
    _check_shapes(proxy_queries, last_query, keys, values, num_groups)
    logits = _checked_logits(proxy_queries, scaling, softcap, sinks)
    valid, tokens = _checked_padding(keys, valid), keys.shape[2]
    if budget >= tokens:
        return torch.arange(tokens, device=keys.device).expand(*keys.shape[:2], -1).contiguous()
    common: dict[str, Any] = {**logits, "valid": valid, "backend": backend}
    if values is None:
        assert num_groups is not None
        groups, last = group_mass(proxy_queries, last_query, keys, num_groups=num_groups, **common)
        scores = vote(groups, mass, backend=backend) + last
    else:
        scores = value_scores(proxy_queries, last_query, keys, values, last_weight=last_query_weight, **common)
    return keep_best(scores, budget, valid, backend=backend)


def refit_values(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    *,
    ridge: float = 3.0,
    steps: int = REFIT_STEPS,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Values with which the kept tokens give queries what the whole prompt gives them (method, step 9).

    Args:
        queries: (B, H, n, D), rotated to positions behind the prompt: some of the proxies.
        keys, values: (B, H_kv, T, D) and (B, H_kv, T, D_v), of the whole prompt, keys rotated; H a multiple of H_kv.
        kept: (B, H_kv, C) int64, ascending, such as `select_tokens` returns.
        ridge: penalty on changed values, in units of the squared attention to a usual kept token, > 0.
        steps: of conjugate gradients from the values as they are.
        scaling: factor on the logits; None: D ** -0.5.
        softcap: logits x become softcap * tanh(x / softcap), as in Gemma 2, > 0; None: they are not capped.
        sinks: (H,) floating, finite: logits of query heads that take mass and give nothing, as in gpt-oss; None: none.
        valid: (B, T) bool, False for padding, which must be on the left; None: no padding.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, H_kv, C, D_v), of the dtype of the values.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; the message names it.
    """
    check_integer("steps", steps, minimum=1)
    check_real("ridge", ridge, lambda value: 0 < value < math.inf, "a finite number > 0")
    check_choice("backend", backend, BACKENDS)
    logits = _checked_logits(queries, scaling, softcap, sinks)
    common: dict[str, Any] = {**logits, "valid": _checked_padding(keys, valid), "backend": backend}
    outputs = attend(queries, keys, values, **common)
    return refit_to_outputs(queries, outputs, keys, values, kept, ridge=ridge, steps=steps, **common)


def _checked_logits(
    queries: torch.Tensor, scaling: float | None, softcap: Any, sinks: torch.Tensor | None
) -> dict[str, Any]:
    """How logits of queries (B, H, n, D) are made, as keywords of the operations.

    Raises:
        TypeError, ValueError: `softcap` or `sinks` are not such as these queries may have.
    """
    if softcap is not None:
        check_real("softcap", softcap, lambda value: 0 < value < math.inf, "a finite number > 0, or None")
    if sinks is not None:
        _check_sinks(sinks, queries)
    scaling = queries.shape[-1] ** -0.5 if scaling is None else scaling
    return {"scaling": scaling, "softcap": softcap, "sinks": sinks}


def _check_sinks(sinks: Any, queries: torch.Tensor) -> None:
    if not isinstance(sinks, torch.Tensor) or not sinks.is_floating_point():
        kind = sinks.dtype if isinstance(sinks, torch.Tensor) else type(sinks).__name__
        raise TypeError(f"sinks is {kind}, must be a tensor of a floating dtype, or None")
    if queries.ndim != 4 or sinks.shape != queries.shape[1:2]:
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}, must be (H,), one logit for each query head")
    if sinks.device != queries.device:
        raise ValueError(f"sinks is on {sinks.device}, must be on {queries.device} like the queries")
    if not sinks.isfinite().all():
        raise ValueError("sinks has numbers that are not finite")


def _checked_padding(keys: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor | None:
    """`valid`, or None if no column of the keys is padding."""
    if valid is None:
        return None
    shape = (keys.shape[0], keys.shape[2])
    if valid.shape != shape or valid.dtype != torch.bool:
        raise ValueError(f"valid is {valid.dtype} {tuple(valid.shape)}, must be bool {shape}")
    return check_left_padding(valid)


def _check_shapes(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    num_groups: int | None,
) -> None:
    named = {"proxy_queries": proxy_queries, "last_query": last_query, "keys": keys}
    if values is not None:
        named["values"] = values
    for name, tensor in named.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must have 4 dimensions")
        if tensor.device != keys.device or tensor.dtype != keys.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, must be {keys.dtype} on {keys.device} like keys"
            )
    batch, heads, proxies, head_dim = proxy_queries.shape
    if keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(f"keys has shape {tuple(keys.shape)}, must be ({batch}, H_kv, T, {head_dim}) for the proxies")
    if keys.shape[2] == 0:
        raise ValueError("keys has no tokens: T must be at least 1")
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(f"keys has {keys.shape[1]} heads, must divide the {heads} heads of proxy_queries")
    if last_query.shape != (batch, heads, 1, head_dim):
        raise ValueError(f"last_query has shape {tuple(last_query.shape)}, must be {(batch, heads, 1, head_dim)}")
    if values is not None and values.shape[:3] != keys.shape[:3]:
        raise ValueError(f"values has shape {tuple(values.shape)}, must be {tuple(keys.shape[:3])} and a head dim")
    if num_groups is not None:
        check_integer("num_groups", num_groups, minimum=1)
    if proxies == 0 or (num_groups is not None and proxies % num_groups):
        raise ValueError(f"num_groups={num_groups} must divide the {proxies} proxies of proxy_queries")
