"""What queries attend to, and the votes that come of it (method, steps 4 and 5)."""

from typing import NamedTuple

import torch


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass that each group of proxies, and the last query, put on every prompt token (method, step 4).

    Proxies lie in the future of the prompt, so nothing is causally masked.  One group is attended to at a time: the
    largest temporary is (B, H, N / G, T), and keys are never repeated for the query heads that share them.

    Args:
        proxy_queries: (B, H, N, D), rotated; proxies of one group are neighbours.
        last_query: (B, H, 1, D), the rotated query of the last prompt token.
        keys: (B, H_kv, T, D), rotated; H is a multiple of H_kv.
        num_groups: G, a divisor of N.
        scaling: factor on the logits.
        softcap: logits x become softcap * tanh(x / softcap).  None: they are not capped.
        sinks: (H,), learned sinks: a logit of each query head, neither scaled nor capped, to which mass goes that no
            token gets.  None: there are none.
        valid: (B, T) bool, False for padding; None when there is none.

    Returns:
        The mass of each group, averaged with that of the last query, (B, H_kv, G, T), and the mass of the last query,
        (B, H_kv, T); both float32 and averaged over the query heads of a KV head.  The last column is 0: that token
        is kept anyway.  Of a token whose key is not finite the first is 0 and the second NaN.
    """
    proxies_per_group = proxy_queries.shape[2] // num_groups
    columns = columns_of(keys, scaling, valid, softcap=softcap, sinks=sinks)
    last_mass = attention_of(last_query, columns).mean(dim=2).sum(dim=2)
    groups = [
        attention_of(group, columns).mean(dim=2).sum(dim=2) for group in proxy_queries.split(proxies_per_group, dim=2)
    ]
    mass = (torch.stack(groups, dim=2) + last_mass.unsqueeze(2)) / (1 + proxies_per_group)
    mass[..., -1] = 0
    last_mass[..., -1] = 0
    return mass, last_mass.masked_fill(~keys.isfinite().all(dim=-1), torch.nan)


class Columns(NamedTuple):
    """What queries attend to.

    Attributes:
        keys: (B, H_kv, D, T) float32, scaled; numbers that are not finite are 0.
        attended: (B, H_kv, 1, T) bool, False for padding and for keys that are not finite.
        softcap: what caps the logits; None: nothing does.
        sinks: (H_kv, r, 1) float32, the learned sink of each query head; None: there are none.
    """

    keys: torch.Tensor
    attended: torch.Tensor
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def columns_of(
    keys: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Columns:
    """Keys (B, H_kv, T, D) to be attended to.

    Args:
        keys: rotated.
        scaling: factor on the logits.
        valid: None, or bool (B, T) or (B, H_kv, T).
        softcap, sinks: as for `group_mass`.
    """
    attended = attended_tokens(keys, valid).unsqueeze(2)
    by_head = None if sinks is None else sinks.float().reshape(keys.shape[1], -1, 1)
    return Columns(finite(keys.float()).transpose(-1, -2) * scaling, attended, softcap, by_head)


def attended_tokens(keys: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """(B, H_kv, T) bool: tokens that are no padding, and whose key is finite."""
    attended = keys.isfinite().all(dim=-1)
    if valid is not None:
        attended = attended & (valid[:, None] if valid.ndim == 2 else valid)
    return attended


def finite(states: torch.Tensor) -> torch.Tensor:
    """The same, but 0 for numbers that are not finite."""
    return states.where(states.isfinite(), 0)


def attention_of(queries: torch.Tensor, columns: Columns) -> torch.Tensor:
    """Softmax rows of (B, H, n, D) queries, (B, H_kv, r, n, T) float32; 0 for a query that is not finite.

    With learned sinks a row sums to less than 1: the rest is the sink's.
    """
    rows = queries.float().unflatten(1, (columns.keys.shape[1], -1))
    logits = soft_capped(rows.flatten(2, 3) @ columns.keys, columns.softcap)
    logits = logits.masked_fill(~columns.attended, -torch.inf)
    # A softmax of nothing is NaN.
    has_sum = rows.isfinite().all(dim=-1).flatten(2, 3).unsqueeze(-1) & columns.attended.any(dim=-1, keepdim=True)
    by_row = None if columns.sinks is None else columns.sinks.expand(-1, -1, rows.shape[3]).flatten(1).unsqueeze(-1)
    return softmax_with_sinks(logits, by_row).where(has_sum, 0).unflatten(2, rows.shape[2:4])


def soft_capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """softcap * tanh(logits / softcap); the logits themselves if nothing caps them."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def softmax_with_sinks(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension of logits (.., T) and their sinks (.., 1), without what the sinks get."""
    if sinks is None:
        return logits.softmax(dim=-1)
    return torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], dim=-1).softmax(dim=-1)[..., :-1]


def vote(mass: torch.Tensor, threshold: float, last_mass: torch.Tensor | None = None) -> torch.Tensor:
    """How many groups need each token to reach their share of the mass (method, step 5).

    A group votes for the minimal set of tokens, largest mass first, that holds `threshold` of the group's total.  That
    is what it gives to tokens: what learned sinks take is no part of it.  Of tokens with equal mass the earlier one
    comes first.

    Args:
        mass: (B, H_kv, G, T) float32, not negative.
        threshold: share of each group's total, in (0, 1].
        last_mass: (B, H_kv, T) float32, that of the last query, which is added to the votes (step 6); None: nothing is.

    Returns:
        Votes (B, H_kv, T) float32, whole numbers from 0 to G without `last_mass`.
    """
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(dim=-1)
    before = torch.nn.functional.pad(reached[..., :-1], (1, 0))
    needed = before < threshold * reached[..., -1:]
    votes = torch.zeros_like(mass).scatter_(-1, order, needed.to(mass.dtype)).sum(dim=-2)
    return votes if last_mass is None else votes + last_mass
