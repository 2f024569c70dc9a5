"""From samples of hidden states to rotated query proxies (method, steps 2 and 3)."""

import torch

from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer


def future_queries(
    layer: AttentionLayer,
    hidden_states: torch.Tensor,
    last: LayerInput,
    *,
    num_groups: int,
    stride: int,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of made-up hidden states at positions after the prompt, and the real query of its last token.

    All are projected at once.

    Args:
        layer: the attention layer.
        hidden_states: (B, N, d); those of one group are neighbours.
        last: what the layer saw of the last prompt token.
        num_groups: G.
        stride: the n-th proxy of each group lies n * stride positions after the prompt.
        backend: "auto", "triton" or "torch".

    Returns:
        Proxies (B, H, N, D) and the last query (B, H, 1, D), both rotated.
    """
    queries = layer.project_queries(torch.cat([hidden_states, last.hidden_states], dim=1))
    count = hidden_states.shape[1] // num_groups
    return layer.rotate_ahead(
        queries[:, :, :-1], queries[:, :, -1:], last.cos, last.sin, count=count, stride=stride, backend=backend
    )
