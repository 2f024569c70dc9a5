"""What a decoding step does besides attention."""

from collections.abc import Sequence

import torch


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
