"""The plain torch meaning of every operation of a selection; also the path taken where there is no Triton.

Symbols: B batch, H query heads, H_kv key/value heads, T prompt tokens, D head dim, N proxies, G groups.
Sums and softmax are float32 whatever the inputs are.
"""

import torch


def group_mass(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    *,
    num_groups: int,
    scaling: float,
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
        valid: (B, T) bool, False for padding; None when there is none.

    Returns:
        The mass of each group, averaged with that of the last query, (B, H_kv, G, T), and the mass of the last query,
        (B, H_kv, T); both float32 and averaged over the query heads of a KV head.  The last column is 0: that token
        is kept anyway.
    """
    proxies_per_group = proxy_queries.shape[2] // num_groups
    columns = keys.float().transpose(-1, -2) * scaling
    last_mass = _summed_attention(last_query, columns, valid)
    groups = [_summed_attention(group, columns, valid) for group in proxy_queries.split(proxies_per_group, dim=2)]
    mass = (torch.stack(groups, dim=2) + last_mass.unsqueeze(2)) / (1 + proxies_per_group)
    mass[..., -1] = 0
    last_mass[..., -1] = 0
    return mass, last_mass


def _summed_attention(queries: torch.Tensor, columns: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Softmax rows of (B, H, n, D) queries summed over n and averaged over each GQA group: (B, H_kv, T)."""
    batch, heads, count, head_dim = queries.shape
    kv_heads = columns.shape[1]
    rows = queries.float().reshape(batch, kv_heads, (heads // kv_heads) * count, head_dim)
    logits = rows @ columns
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None, :], -torch.inf)
    return logits.softmax(dim=-1).sum(dim=-2) * (kv_heads / heads)


def vote(mass: torch.Tensor, threshold: float) -> torch.Tensor:
    """How many groups need each token to reach their share of the mass (method, step 5).

    A group votes for the minimal set of tokens, largest mass first, that holds `threshold` of the group's total.  Of
    tokens with equal mass the earlier one comes first.

    Args:
        mass: (B, H_kv, G, T) float32, not negative.
        threshold: share of each group's total, in (0, 1].

    Returns:
        Votes (B, H_kv, T) float32, whole numbers from 0 to G.
    """
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(dim=-1)
    before = torch.nn.functional.pad(reached[..., :-1], (1, 0))
    needed = before < threshold * reached[..., -1:]
    return torch.zeros_like(mass).scatter_(-1, order, needed.to(mass.dtype)).sum(dim=-2)


def keep_best(scores: torch.Tensor, count: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The last token and the `count - 1` others with the highest scores (method, step 6).

    Of tokens with equal scores the earlier one is kept.  Padding is kept only where a row has fewer valid tokens than
    `count`, and then the padding nearest to them, so that the kept columns line up with the end of a padding mask.

    Args:
        scores: (B, H_kv, T) float32, not negative.
        count: tokens to keep, from 1 to T.
        valid: (B, T) bool, left-padded; None when there is no padding.

    Returns:
        (B, H_kv, count) int64, ascending.
    """
    tokens = scores.shape[-1]
    if valid is not None:
        nearness = torch.arange(tokens, device=scores.device, dtype=scores.dtype) - tokens
        scores = torch.where(valid[:, None, :], scores, nearness)
    order = scores[..., :-1].sort(dim=-1, descending=True, stable=True).indices
    kept = order[..., : count - 1].sort(dim=-1).values
    return torch.nn.functional.pad(kept, (0, 1), value=tokens - 1)


def gather(
    keys: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, *, capacity: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept keys and values, in storage of their own.

    Args:
        keys: (B, H_kv, T, D).
        values: (B, H_kv, T, D_v).
        indices: (B, H_kv, C) int64.
        capacity: slots to allocate, at least C; the slots from C on are left unwritten.  None: C.

    Returns:
        Keys (B, H_kv, capacity, D) and values (B, H_kv, capacity, D_v), contiguous, of the inputs' dtype.
    """
    return _gather_rows(keys, indices, capacity), _gather_rows(values, indices, capacity)


def _gather_rows(states: torch.Tensor, indices: torch.Tensor, capacity: int | None) -> torch.Tensor:
    kept = states.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))
    if capacity is None or capacity == kept.shape[2]:
        return kept
    storage = kept.new_empty((*kept.shape[:2], capacity, kept.shape[3]))
    storage[:, :, : kept.shape[2]] = kept
    return storage
