"""From the statistics of a layer's hidden states to rotated query proxies (method, steps 1 to 3)."""

import torch

from .attention import AttentionLayer

_TOKENS_AT_ONCE = 2048  # bounds the float32 copy of the hidden states


def token_statistics(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the features of each token, and their summed squared deviation from it.

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
    """Mean and unbiased standard deviation over tokens and features (step 1).

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


def gaussian_noise(count: int, features: int, *, seed: int, layer: int, device: torch.device) -> torch.Tensor:
    """Standard normal samples, (count, features) float32, the same for every prompt and batch row.

    The generator is the layer's own: torch's global random state is neither read nor changed.
    """
    generator = torch.Generator(device).manual_seed((seed << 16) + layer)
    return torch.randn(count, features, generator=generator, device=device)


def expanded_samples(
    mean: torch.Tensor, deviation: torch.Tensor, noise: torch.Tensor, *, gamma: float, dtype: torch.dtype
) -> torch.Tensor:
    """Samples (B, N, d) with `gamma` times the prompt's deviation, of (B,) statistics and (N, d) noise (step 2)."""
    return torch.addcmul(mean[:, None, None], (gamma * deviation)[:, None, None], noise).to(dtype)


def future_queries(
    layer: AttentionLayer,
    hidden_states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_groups: int,
    stride: int,
) -> torch.Tensor:
    """Projects (B, N, d) hidden states and rotates each group to the positions after the prompt (steps 2 and 3).

    Args:
        layer: the attention layer.
        hidden_states: (B, N, d); those of one group are neighbours.
        cos, sin: (B or 1, 1, rotary dim), of the last prompt token.
        num_groups: G.
        stride: the n-th proxy of each group lies n * stride positions after the prompt.

    Returns:
        (B, H, N, D).
    """
    queries = layer.project_queries(hidden_states)
    group_size = queries.shape[2] // num_groups
    cos, sin = layer.advance(cos, sin, count=group_size, stride=stride)
    # All groups take the same positions, so they may pass for more heads.
    groups = queries.unflatten(2, (num_groups, group_size)).flatten(1, 2)
    return layer.rotate(groups, cos, sin).unflatten(1, (-1, num_groups)).flatten(2, 3)
