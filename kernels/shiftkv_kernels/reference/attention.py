"""What proxies attend to, and the scores that come of it (method, steps 4 to 6)."""

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
