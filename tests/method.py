"""method.md stated once more in float64 NumPy, with loops where the library has tensor operations."""

import numpy as np

Array = np.ndarray


def statistics(hidden_states: Array, valid: Array, window: int | None) -> tuple[float, float]:
    """Step 1 for one row: hidden states (T, d), valid (T,)."""
    if window is not None:
        hidden_states, valid = hidden_states[-window:], valid[-window:]
    numbers = hidden_states[valid].astype(np.float64).ravel()
    return numbers.mean(), numbers.std(ddof=1)


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def attention_mass(queries: Array, keys: Array, valid: Array, scaling: float) -> Array:
    """Step 4 for one KV head: queries (r, n, D) of the heads that share it, keys (T, D) -> (n, T), last column 0."""
    logits = np.where(valid, queries @ keys.T * scaling, -np.inf)
    mass = np.stack([[softmax(row) for row in head] for head in logits]).mean(axis=0)
    mass[:, -1] = 0
    return mass


def votes_of(group: Array, threshold: float) -> set[int]:
    """Step 5: the minimal set of tokens, largest mass first, that reaches the threshold of the total."""
    chosen: set[int] = set()
    reached = 0.0
    for token in np.argsort(-group, kind="stable"):
        if reached >= threshold * group.sum():
            break
        chosen.add(int(token))
        reached += group[token]
    return chosen


def scores(proxies: Array, last_query: Array, keys: Array, valid: Array, groups: int, mass: float, scaling: float) -> Array:
    """Steps 4 to 6 for one KV head: proxies (r, N, D), last_query (r, 1, D), keys (T, D) -> (T,)."""
    size = proxies.shape[1] // groups
    last = attention_mass(last_query, keys, valid, scaling)[0]
    by_proxy = attention_mass(proxies, keys, valid, scaling)
    votes = np.zeros(len(keys))
    for group in range(groups):
        combined = (by_proxy[group * size : (group + 1) * size].sum(axis=0) + last) / (1 + size)
        votes[sorted(votes_of(combined, mass))] += 1
    return votes + last


def kept(score: Array, valid: Array, budget: int) -> list[int]:
    """Step 6 for one KV head: the best tokens and the last; a short row keeps its last padding columns."""
    tokens = len(score)
    count = min(budget, tokens)
    order = sorted(
        range(tokens - 1), key=lambda token: (not valid[token], -score[token] if valid[token] else -token, token)
    )
    return sorted([*order[: count - 1], tokens - 1])


def select(
    proxies: Array,
    last_query: Array,
    keys: Array,
    *,
    budget: int,
    num_groups: int,
    mass: float,
    scaling: float,
    valid: Array | None = None,
) -> Array:
    """(B, H, N, D), (B, H, 1, D), (B, H_kv, T, D) -> (B, H_kv, min(budget, T))."""
    proxies, last_query, keys = (part.astype(np.float64) for part in (proxies, last_query, keys))
    batch, kv_heads, tokens, _ = keys.shape
    shared = proxies.shape[1] // kv_heads
    valid = np.ones((batch, tokens), bool) if valid is None else valid
    result = np.zeros((batch, kv_heads, min(budget, tokens)), int)
    for row in range(batch):
        for head in range(kv_heads):
            heads = slice(head * shared, (head + 1) * shared)
            score = scores(
                proxies[row, heads], last_query[row, heads], keys[row, head], valid[row], num_groups, mass, scaling
            )
            result[row, head] = kept(score, valid[row], budget)
    return result
