"""method.md stated once more in float64 NumPy, with loops where the library has tensor operations."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Logits:
    """How the query heads of one KV head make logits.

    Attributes:
        scaling: factor on them.
        softcap: x becomes softcap * tanh(x / softcap); None: they are not capped.
        sinks: the learned sinks of the r query heads; None: there are none.
    """

    scaling: float
    softcap: float | None = None
    sinks: Array | None = None

    def attention(self, queries: Array, keys: Array, valid: Array) -> Array:
        """What queries (r, n, D) give to each token, keys (T, D) -> (r, n, T); a sink has the rest."""
        sinks = [-np.inf] * len(queries) if self.sinks is None else self.sinks
        return np.stack(
            [[self._row(query, keys, valid, sink) for query in head] for head, sink in zip(queries, sinks, strict=True)]
        )

    def _row(self, query: Array, keys: Array, valid: Array, sink: float) -> Array:
        logits = keys @ query * self.scaling
        if self.softcap is not None:
            logits = self.softcap * np.tanh(logits / self.softcap)
        return softmax(np.append(np.where(valid, logits, -np.inf), sink))[:-1]


def attention_mass(queries: Array, keys: Array, valid: Array, logits: Logits) -> Array:
    """Step 4 for one KV head: queries (r, n, D) of the heads that share it, keys (T, D) -> (n, T), last column 0."""
    mass = logits.attention(queries, keys, valid).mean(axis=0)
    mass[:, -1] = 0
    return mass


def votes_of(group: Array, threshold: float) -> set[int]:
    """Step 5: the minimal set of tokens, largest mass first, that reaches the threshold of what tokens have in all."""
    chosen: set[int] = set()
    reached = 0.0
    for token in np.argsort(-group, kind="stable"):
        if reached >= threshold * group.sum():
            break
        chosen.add(int(token))
        reached += group[token]
    return chosen


def scores(
    proxies: Array, last_query: Array, keys: Array, valid: Array, groups: int, mass: float, logits: Logits
) -> Array:
    """Steps 4 to 6 for one KV head: proxies (r, N, D), last_query (r, 1, D), keys (T, D) -> (T,)."""
    size = proxies.shape[1] // groups
    last = attention_mass(last_query, keys, valid, logits)[0]
    by_proxy = attention_mass(proxies, keys, valid, logits)
    votes = np.zeros(len(keys))
    for group in range(groups):
        combined = (by_proxy[group * size : (group + 1) * size].sum(axis=0) + last) / (1 + size)
        votes[sorted(votes_of(combined, mass))] += 1
    return votes + last


SINK = 1e30  # above all other scores


def given_shares(mass: Array) -> Array:
    """Mass (rows, T) of queries: its root mean square, over the mean mass that would take its place -> (T,)."""
    return np.sqrt((mass**2).mean(axis=0)) / (1 - np.minimum(mass.mean(axis=0), 0.999))


def value_scores(
    proxies: Array, last_query: Array, keys: Array, values: Array, valid: Array, logits: Logits, last_weight: float
) -> Array:
    """Steps 7 and 8 for one KV head: proxies (r, N, D), last_query (r, 1, D), values (T, D_v)."""
    by_proxy, by_last = (np.concatenate(logits.attention(part, keys, valid)) for part in (proxies, last_query))
    output = by_proxy.mean(axis=0) @ values
    distance = np.array([np.linalg.norm(value - output) for value in values])
    scores = (given_shares(by_proxy) + last_weight * given_shares(by_last)) * distance
    mean = by_proxy.mean(axis=0)
    return np.where(valid, np.where(mean > 0.15, SINK * (1 + mean), scores), 0)


def has_sink(proxies: Array, last_query: Array, keys: Array, valid: Array, logits: Logits, groups: int | None) -> bool:
    """Whether a KV head has an attention sink: proxies (r, N, D), last_query (r, 1, D), keys (T, D); voting groups."""
    mass = logits.attention(proxies, keys, valid).mean(axis=(0, 1))
    if groups is not None:
        # Their mass has the last query in it; that of the last token is not counted.
        size = proxies.shape[1] // groups
        mass = (size * mass + attention_mass(last_query, keys, valid, logits)[0]) / (1 + size)
        mass[-1] = 0
    return bool((mass > 0.15).any())


@dataclass
class Refit:
    """Step 9 for one KV head: what the values of the chosen tokens are refitted to.

    Attributes:
        attention: (rows, C) of the queries to the chosen tokens.
        missing: (rows, D_v), what these do not give to the queries of the whole prompt's outputs.
        penalty: on changed values.
        plain: (C, D_v), the values as they are.
    """

    attention: Array
    missing: Array
    penalty: float
    plain: Array

    @classmethod
    def of(
        cls, queries: Array, keys: Array, values: Array, chosen: list[int], valid: Array, logits: Logits, ridge: float
    ) -> "Refit":
        """Of queries (r, n, D), keys (T, D), values (T, D_v) and the chosen tokens."""
        whole = np.concatenate(logits.attention(queries, keys, valid))
        part = np.concatenate(logits.attention(queries, keys[chosen], valid[chosen]))
        squares = (part**2).sum(axis=0)
        counted = squares[valid[chosen]]
        usual = np.exp(np.log(np.maximum(counted, 1e-6 * counted.mean())).mean())
        return cls(part, whole @ values - part @ values[chosen], ridge * usual, values[chosen])

    def values(self, steps: int | None = None) -> Array:
        """The refitted values after so many steps of conjugate gradients; None: the solution."""
        gram = self.attention.T @ self.attention + self.penalty * np.eye(len(self.plain))
        right = self.attention.T @ self.missing
        if steps is None:
            return self.plain + np.linalg.solve(gram, right)
        return self.plain + np.stack([conjugate_gradients(gram, column, steps) for column in right.T], axis=1)

    def error(self, values: Array) -> float:
        """The squared error of the queries' outputs from these values, plus the penalty."""
        change = values - self.plain
        return ((self.missing - self.attention @ change) ** 2).sum() + self.penalty * (change**2).sum()


def conjugate_gradients(matrix: Array, right: Array, steps: int) -> Array:
    """Steps from 0 towards the solution x of matrix @ x = right, scaled by the diagonal of the matrix."""
    solution, residual = np.zeros_like(right), right
    scaled = direction = residual / np.diag(matrix)
    for _ in range(steps):
        if not residual.any():
            break
        length = residual @ scaled / (direction @ matrix @ direction)
        solution = solution + length * direction
        smaller = residual - length * (matrix @ direction)
        rescaled = smaller / np.diag(matrix)
        direction = rescaled + smaller @ rescaled / (residual @ scaled) * direction
        residual, scaled = smaller, rescaled
    return solution


def kept(score: Array, valid: Array, budget: int) -> list[int]:
    """Step 6 for one KV head: the best tokens and the last; a short row keeps its last padding columns."""
    tokens = len(score)
    count = min(budget, tokens)
    order = sorted(
        range(tokens - 1), key=lambda token: (not valid[token], -score[token] if valid[token] else -token, token)
    )
    return sorted([*order[: count - 1], tokens - 1])


def assert_selects(
    found: Array,
    proxies: Array,
    last_query: Array,
    keys: Array,
    *,
    budget: int,
    scaling: float,
    valid: Array,
    num_groups: int | None = None,
    mass: float = 0.95,
    values: Array | None = None,
    last_query_weight: float = 1.0,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> None:
    """`found`, (B, H_kv, C), is what the method selects, up to scores that tie within float32 rounding.

    Args:
        proxies: (B, H, N, D).
        last_query: (B, H, 1, D).
        keys: (B, H_kv, T, D).
        valid: (B, T).
        values: (B, H_kv, T, D_v): tokens count by them instead of by the votes of `num_groups` groups.
        sinks: (H,).
    """
    proxies, last_query, keys = (part.astype(np.float64) for part in (proxies, last_query, keys))
    shared = proxies.shape[1] // keys.shape[1]
    for row, head in np.ndindex(*keys.shape[:2]):
        heads = slice(head * shared, (head + 1) * shared)
        asked = proxies[row, heads], last_query[row, heads], keys[row, head]
        logits = Logits(scaling, softcap, None if sinks is None else sinks[heads])
        if values is None:
            assert num_groups is not None
            score, tolerance = scores(*asked, valid[row], num_groups, mass, logits), 1e-5
        else:
            given = values[row, head].astype(np.float64)
            score = value_scores(*asked, given, valid[row], logits, last_query_weight)
            tolerance = 1e-5 * max(score.max(), 1.0)
        expected, mine = kept(score, valid[row], budget), found[row, head].tolist()
        assert mine == sorted(set(mine))
        assert mine[-1] == len(score) - 1
        assert [token for token in mine if not valid[row, token]] == [t for t in expected if not valid[row, t]]
        np.testing.assert_allclose(
            np.sort(score[mine]),
            np.sort(score[expected]),
            atol=tolerance,
            rtol=1e-7 if values is None else 1e-4,
            err_msg=f"row {row}, KV head {head}: {mine}",
        )
