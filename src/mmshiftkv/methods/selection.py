"""The selection as a function of queries and keys, for use without a cache."""

import torch

from shiftkv_kernels import group_mass, keep_best, vote

from ..checks import BACKENDS, check_choice, check_integer
from ..model.padding import check_left_padding
from .config import check_mass


def select_tokens(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    *,
    budget: int,
    num_groups: int,
    mass: float = 0.95,
    scaling: float | None = None,
    valid: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The prompt tokens that MM-ShiftKV keeps (method, steps 4 to 6).

    Args:
        proxy_queries: (B, H, N, D), rotated; the proxies of one group are neighbours.
        last_query: (B, H, 1, D), the rotated query of the last prompt token.
        keys: (B, H_kv, T, D), rotated; H a multiple of H_kv.
        budget: tokens kept per KV head.
        num_groups: groups of proxies, a divisor of N.
        mass: share of a group's attention mass that its votes must hold, in (0, 1].
        scaling: factor on the logits; None: D ** -0.5.
        valid: (B, T) bool, False for padding, which must be on the left; None: no padding.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, H_kv, min(budget, T)) int64, ascending, the last token always included.  A row with fewer valid tokens than
        the budget keeps all of them and its last padding columns.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; the message names it.
    """
    check_integer("budget", budget, minimum=1)
    check_integer("num_groups", num_groups, minimum=1)
    check_choice("backend", backend, BACKENDS)
    check_mass(mass)
    _check_shapes(proxy_queries, last_query, keys, num_groups)
    batch, kv_heads, tokens, head_dim = keys.shape
    if valid is not None:
        if valid.shape != (batch, tokens) or valid.dtype != torch.bool:
            raise ValueError(f"valid is {valid.dtype} {tuple(valid.shape)}, must be bool {(batch, tokens)}")
        valid = check_left_padding(valid)
    if budget >= tokens:
        return torch.arange(tokens, device=keys.device).expand(batch, kv_heads, -1).contiguous()
    groups, last = group_mass(
        proxy_queries,
        last_query,
        keys,
        num_groups=num_groups,
        scaling=head_dim**-0.5 if scaling is None else scaling,
        valid=valid,
        backend=backend,
    )
    return keep_best(vote(groups, mass, backend=backend) + last, budget, valid, backend=backend)


def _check_shapes(proxy_queries: torch.Tensor, last_query: torch.Tensor, keys: torch.Tensor, num_groups: int) -> None:
    named = {"proxy_queries": proxy_queries, "last_query": last_query, "keys": keys}
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
    if proxies == 0 or proxies % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the {proxies} proxies of proxy_queries")
