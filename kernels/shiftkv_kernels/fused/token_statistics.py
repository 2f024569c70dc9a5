"""Statistics of each token's features (step 1), in one pass over the hidden states."""

import torch
import triton
import triton.language as tl

from ..device import on_device
from ..launching import launch
from ..sizes import next_power_of_2


@triton.jit(do_not_specialize=["T"])
def _token_statistics_kernel(
    p_states, p_means, p_squares, p_last, T, stride_b, stride_t, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mean of a token's features and their summed squared deviation from it; the last token's are copied."""
    t, batch = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    d = tl.arange(0, BLOCK)
    m_d = d < D
    p_row = p_states + batch * stride_b + tl.cast(t, tl.int64) * stride_t
    row = tl.load(p_row + d, mask=m_d, other=0.0)
    if p_last is not None:
        tl.store(p_last + batch * D + d, row, mask=m_d & (t == T - 1))
    states = tl.cast(row, tl.float32)
    mean = tl.sum(states, 0) * (1.0 / D)
    deviations = tl.where(m_d, states - mean, 0.0)
    tl.store(p_means + batch * T + t, mean)
    tl.store(p_squares + batch * T + t, tl.sum(deviations * deviations, 0))


def token_statistics(
    hidden_states: torch.Tensor, last: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.token_statistics`, on a GPU."""
    batch, tokens, features = hidden_states.shape
    if hidden_states.stride(-1) != 1:
        hidden_states = hidden_states.contiguous()
    means = hidden_states.new_empty((batch, tokens), dtype=torch.float32)
    squares = torch.empty_like(means)
    block = next_power_of_2(features)
    with on_device(hidden_states.get_device()):
        launch(
            _token_statistics_kernel,
            (tokens, batch),
            hidden_states,
            means,
            squares,
            last,
            tokens,
            *hidden_states.stride()[:2],
            D=features,
            BLOCK=block,
            num_warps=min(max(block // 1024, 1), 16),
        )
    return means, squares
