"""Query proxies: statistics, samples and rotation (method, steps 1 to 3)."""

import math

import torch

_WORD = 0xFFFFFFFF

_TOKENS_AT_ONCE = 2048  # bounds the float32 copy of the hidden states


def token_statistics(
    hidden_states: torch.Tensor, last: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the features of each token, and their summed squared deviation from it (method, step 1).

    These are what the statistics of any set of tokens can be made of, so a prompt may come in pieces.

    Args:
        hidden_states: (B, t, d).
        last: (B, 1, d), contiguous and of their dtype: gets the last token's; None: these are not copied.

    Returns:
        Two (B, t) float32 tensors.
    """
    if last is not None:
        last.copy_(hidden_states[:, -1:])
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
        Mean and deviation, each (B,) float32.  Tokens with statistics that are not finite are left out.
    """
    if window is not None:
        means, squares = means[:, -window:], squares[:, -window:]
    is_counted = means.isfinite() & squares.isfinite()
    if valid is not None:
        is_counted = is_counted & valid[:, -means.shape[1] :]
    weights = is_counted.to(means.dtype)
    means, squares = means.where(is_counted, 0), squares.where(is_counted, 0)
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
    last: torch.Tensor | None = None,
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
        last: (B, 1, d), a state that follows the samples, of the dtype `dtype`.  None: none does.

    Returns:
        (B, N, d), or (B, N + 1, d) with `last`.
    """
    mean, deviation = prompt_statistics(means, squares, features, valid=valid, window=window)
    noise = gaussian_noise(count, features, seed=seed, stream=stream, device=means.device)
    samples = torch.addcmul(mean[:, None, None], (gamma * deviation)[:, None, None], noise).to(dtype)
    return samples if last is None else torch.cat([samples, last], dim=1)


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
