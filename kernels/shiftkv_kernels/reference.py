"""The plain torch meaning of every operation; also the path taken where there is no Triton.

Symbols: B batch, H query heads, H_kv key/value heads, T prompt tokens, D head dim, N proxies, G groups.
Sums and softmax are float32 whatever the inputs are.
"""

import math
from collections.abc import Sequence

import torch

_WORD = 0xFFFFFFFF

_TOKENS_AT_ONCE = 2048  # bounds the float32 copy of the hidden states


def token_statistics(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the features of each token, and their summed squared deviation from it (method, step 1).

    These are what the statistics of any set of tokens can be made of, so a prompt may come in pieces.

    Args:
        hidden_states: (B, t, d).

    Returns:
        Two (B, t) float32 tensors.
    """
    means, squares = [], []
    for block in hidden_states.split(_TOKENS_AT_ONCE, dim=1):
        variance, mean = torch.var_mean(block.float(), dim=-1, correction=0)
        means.append(mean)
        squares.append(variance * hidden_states.shape[-1])
    return torch.cat(means, dim=1), torch.cat(squares, dim=1)


def prompt_statistics(
    means: torch.Tensor,
    squares: torch.Tensor,
    features: int,
    *,
    valid: torch.Tensor | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased standard deviation over tokens and features (method, step 1).

    Args:
        means, squares: (B, T), as `token_statistics` gives them.
        features: d.
        valid: (B, T) bool, left-padded: padding is left out.  None: there is none.
        window: only the last so many tokens count.  None: all.

    Returns:
        Mean and deviation, each (B,) float32.
    """
    if window is not None:
        means, squares = means[:, -window:], squares[:, -window:]
    weights = torch.ones_like(means) if valid is None else valid[:, -means.shape[1] :].to(means.dtype)
    count = weights.sum(dim=1)
    mean = (means * weights).sum(dim=1) / count
    between = features * (means - mean[:, None]).square()
    variance = ((squares + between) * weights).sum(dim=1) / (count * features - 1)
    return mean, variance.sqrt()


def gaussian_noise(count: int, features: int, *, seed: int, stream: int, device: torch.device) -> torch.Tensor:
    """Standard normal samples, (count, features) float32: a function of the arguments alone, on every device.

    The counter-based generator Philox4x32-10 gives four integers per counter, which make two pairs of values
    (Box-Muller); the values of a counter go to the four quarters of the samples.  No random state is read or changed.

    Args:
        seed, stream: from 0 to 2**32 - 1; every pair of them gives samples of its own.
    """
    quarter = -(-count * features // 4)
    counters = torch.arange(quarter, device=device)
    # 23 bits: every value is a float32, and the middle of its interval is neither 0 nor 1.
    units = [(bits >> 9).float() / 2**23 for bits in _philox(counters, stream, seed)]
    lengths = [(-2 * (unit + 2**-24).log()).sqrt() for unit in units[::2]]
    angles = [2 * math.pi * unit for unit in units[1::2]]
    pairs = [(length * angle.cos(), length * angle.sin()) for length, angle in zip(lengths, angles, strict=True)]
    return torch.cat([*pairs[0], *pairs[1]])[: count * features].view(count, features)


def _philox(counters: torch.Tensor, first_key: int, second_key: int) -> list[torch.Tensor]:
    """Four random 32-bit integers for each counter (Salmon et al., 2011), in int64."""
    words = [counters, torch.zeros_like(counters), torch.zeros_like(counters), torch.zeros_like(counters)]
    for _ in range(10):
        # Products of two 32-bit integers may overflow; their bits are right nonetheless.
        even, odd = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (odd >> 32 & _WORD) ^ words[1] ^ first_key,
            odd & _WORD,
            (even >> 32 & _WORD) ^ words[3] ^ second_key,
            even & _WORD,
        ]
        first_key, second_key = first_key + 0x9E3779B9 & _WORD, second_key + 0xBB67AE85 & _WORD
    return words


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
) -> torch.Tensor:
    """Samples with the prompt's mean and `gamma` times its deviation (method, steps 1 and 2).

    All rows of the batch share the noise.

    Args:
        means, squares: (B, T) token statistics, as `token_statistics` gives them.
        count: samples N.
        features: d.
        gamma: factor on the deviation.
        seed, stream: of the noise, as `gaussian_noise` takes them.
        dtype: of the samples.
        valid: (B, T) bool, left-padded: padding is left out of the statistics.  None: there is none.
        window: only the last so many tokens count for the statistics.  None: all.

    Returns:
        (B, N, d).
    """
    mean, deviation = prompt_statistics(means, squares, features, valid=valid, window=window)
    noise = gaussian_noise(count, features, seed=seed, stream=stream, device=means.device)
    return torch.addcmul(mean[:, None, None], (gamma * deviation)[:, None, None], noise).to(dtype)


def rotate_queries(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    step_cos: torch.Tensor,
    step_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the proxies to positions after the prompt, and the last query to its own (method, step 3).

    For rotary embeddings that pair feature i with feature i + rotary dim / 2; features from the rotary dim on stay.

    Args:
        proxy_queries: (B, H, N, D), not rotated; the n-th goes the (n mod g)-th step.
        last_query: (B, H, 1, D), not rotated.
        cos, sin: (B or 1, 1, rotary dim), of the last prompt token.
        step_cos, step_sin: (g, rotary dim) float32, of the angles between that token and each later position.

    Returns:
        Both rotated, of the same shapes and dtype, contiguous.
    """
    wide_cos, wide_sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    steps = torch.arange(proxy_queries.shape[2], device=cos.device) % step_cos.shape[0]
    later_cos = wide_cos * step_cos[steps] - wide_sin * step_sin[steps]
    later_sin = wide_sin * step_cos[steps] + wide_cos * step_sin[steps]
    return _rotated(proxy_queries, later_cos, later_sin), _rotated(last_query, wide_cos, wide_sin)


def _rotated(queries: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turning, rest = queries.float().tensor_split([cos.shape[-1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1).to(queries.dtype)


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
    keys: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept keys and values, in storage of their own.

    Args:
        keys: (B, H_kv, T, D).
        values: (B, H_kv, T, D_v).
        indices: (B, H_kv, C) int64.
        out: keys (B, H_kv, S, D) and values (B, H_kv, S, D_v) to write to, S >= C, contiguous, of the inputs' dtype
            and device, sharing no memory with them.  The slots from C on are set to 0, whatever they held: attention
            gives empty slots no weight, but no weight times NaN is NaN.  None: new storage of C slots.

    Returns:
        `out`, or new keys (B, H_kv, C, D) and values (B, H_kv, C, D_v), contiguous, of the inputs' dtype.
    """
    kept_keys, kept_values = _gather_rows(keys, indices), _gather_rows(values, indices)
    if out is None:
        return kept_keys, kept_values
    return _store(kept_keys, out[0]), _store(kept_values, out[1])


def _gather_rows(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return states.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))


def _store(kept: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
    count = kept.shape[2]
    storage[:, :, :count] = kept
    storage[:, :, count:] = 0
    return storage


def project_token(
    state: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Linear layers that share the state of one token.

    Args:
        state: (..., K), all sizes but the last 1.
        weights: (N, K) each, with an N of its own.
        biases: (N,) or None for each of them.

    Returns:
        A (..., N) for each of them, of the inputs' dtype.
    """
    return [torch.nn.functional.linear(state, *parts) for parts in zip(weights, biases, strict=True)]
