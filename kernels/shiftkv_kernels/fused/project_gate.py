"""The inner part of a gated MLP, for one token of one row, in one launch.

Each program has an output of the gate and the same output of the other layer at once, so that no product of theirs is
left for another launch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..launching import launch
from .project_token import ONE_ROW


@triton.jit
def _gated(gate, up, dtype: tl.constexpr):
    """SiLU of the gate times the other, each rounded to the dtype as if it were stored."""
    gate = gate.to(dtype).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return gate * up.to(dtype).to(tl.float32)


@triton.jit
def _project_gate_kernel(
    p_state,
    p_norm,
    eps,
    p_weight_0,
    p_bias_0,
    p_weight_1,
    p_bias_1,
    p_out,
    K,
    BLOCK_K: tl.constexpr,
):
    """One output."""
    n = tl.cast(tl.program_id(0), tl.int64)
    k = tl.arange(0, BLOCK_K)
    p_weight_0 += n * K
    p_weight_1 += n * K
    gates, ups = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        mask = k < K - start
        state = tl.load(p_state + start + k, mask=mask, other=0).to(tl.float32)
        weight_0 = tl.load(p_weight_0 + start + k, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
        weight_1 = tl.load(p_weight_1 + start + k, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
        if p_norm is not None:
            squares += state * state
            state *= tl.load(p_norm + start + k, mask=mask, other=0).to(tl.float32)
        gates += weight_0 * state
        ups += weight_1 * state
    gate, up = tl.sum(gates, 0), tl.sum(ups, 0)
    if p_norm is not None:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        gate *= scale
        up *= scale
    if p_bias_0 is not None:
        gate += tl.load(p_bias_0 + n).to(tl.float32)
    if p_bias_1 is not None:
        up += tl.load(p_bias_1 + n).to(tl.float32)
    tl.store(p_out + n, _gated(gate, up, p_out.dtype.element_ty))


def project_gate(
    state: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """As `reference.project_gate`, on a GPU."""
    outputs, inputs = weights[0].shape
    out = state.new_empty((*state.shape[:-1], outputs))
    layers = [part for layer in zip(weights, biases, strict=True) for part in layer]
    given = (state, *(norm or (None, 0.0)), *layers, out)
    with torch.cuda.device_of(state):
        launch(_project_gate_kernel, (outputs,), *given, inputs, **ONE_ROW)
    return out
