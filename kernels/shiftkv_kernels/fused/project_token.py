"""Linear layers that share the states of one token of each row, in one launch: what most of a decoding step is.

Few rows leave nothing to compute; all that counts is to read the weights at the speed of the memory.  A launch of its
own for each small layer cannot: it is over before enough reads are under way.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..launching import launch
from ..sizes import MOST_ROWS, divided_up

_MOST_LAYERS = 3  # queries, keys and values
# For one row.  The best of eight in a step of Qwen2.5-VL-7B on an H200, by 3 %; on an H100 within 0.2 % of the best of
# five.
ONE_ROW: dict[str, Any] = {"BLOCK_K": 512, "num_warps": 2}
# For several rows: outputs, bytes of inputs, tiles under way, and warps.  The best of nine in such a step of eight rows
# on an H200; 80 KiB of shared memory (Hopper: 100) are there on every supported GPU.
_OUTPUTS, _INPUT_BYTES, _STAGES, _ROWS_WARPS = 64, 256, 5, 4

_Layer = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]  # weight (N, K), bias (N,), out (..., N)


@triton.jit
def _project(p_state, p_norm, eps, p_residual, p_weight, p_bias, p_out, n, K, BLOCK_K: tl.constexpr):
    """Writes output n of one linear layer."""
    n = tl.cast(n, tl.int64)
    k = tl.arange(0, BLOCK_K)
    p_weight += n * K
    if p_residual is not None:
        residual = tl.load(p_residual + n).to(tl.float32)  # while weights are on their way
    sums, squares = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        mask = k < K - start
        state = tl.load(p_state + start + k, mask=mask, other=0).to(tl.float32)
        # A step reads each weight once: it need not push anything out of the cache.
        weight = tl.load(p_weight + start + k, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
        if p_norm is not None:
            squares += state * state
            state *= tl.load(p_norm + start + k, mask=mask, other=0).to(tl.float32)
        sums += weight * state
    total = tl.sum(sums, 0)
    if p_norm is not None:
        total *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    if p_bias is not None:
        total += tl.load(p_bias + n).to(tl.float32)
    if p_residual is not None:
        total = total.to(p_out.dtype.element_ty).to(tl.float32) + residual
    tl.store(p_out + n, total)


@triton.jit
def _project_token_kernel(
    p_state,
    p_norm,
    eps,
    p_residual,
    p_weight_0,
    p_bias_0,
    p_out_0,
    p_weight_1,
    p_bias_1,
    p_out_1,
    p_weight_2,
    p_bias_2,
    p_out_2,
    K,
    N_0,
    N_1,
    BLOCK_K: tl.constexpr,
):
    """One output of one to three linear layers; what is added to outputs is added to the first's."""
    n = tl.program_id(0)
    if n < N_0:
        _project(p_state, p_norm, eps, p_residual, p_weight_0, p_bias_0, p_out_0, n, K, BLOCK_K)
    elif n < N_0 + N_1:
        if p_weight_1 is not None:
            _project(p_state, p_norm, eps, None, p_weight_1, p_bias_1, p_out_1, n - N_0, K, BLOCK_K)
    else:
        if p_weight_2 is not None:
            _project(p_state, p_norm, eps, None, p_weight_2, p_bias_2, p_out_2, n - N_0 - N_1, K, BLOCK_K)


@triton.jit
def _project_rows_kernel(
    p_state,
    p_weight_0,
    p_bias_0,
    p_out_0,
    p_weight_1,
    p_bias_1,
    p_out_1,
    p_weight_2,
    p_bias_2,
    p_out_2,
    rows,
    K,
    N_0,
    N_1,
    N_2,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of outputs of one of one to three linear layers, for all rows."""
    tile = tl.program_id(0)
    tiles_0, tiles_1 = tl.cdiv(N_0, BLOCK_N), tl.cdiv(N_1, BLOCK_N)
    is_0, is_2 = tile < tiles_0, tile >= tiles_0 + tiles_1
    is_1 = (is_0 | is_2) == 0
    # One loop for all: loops of their own would have tiles in shared memory of their own.
    p_weight, p_out, N, first = p_weight_0, p_out_0, N_0, 0
    if p_weight_1 is not None:
        p_weight, p_out = tl.where(is_1, p_weight_1, p_weight), tl.where(is_1, p_out_1, p_out)
        N, first = tl.where(is_1, N_1, N), tl.where(is_1, tiles_0, first)
    if p_weight_2 is not None:
        p_weight, p_out = tl.where(is_2, p_weight_2, p_weight), tl.where(is_2, p_out_2, p_out)
        N, first = tl.where(is_2, N_2, N), tl.where(is_2, tiles_0 + tiles_1, first)
    n = tl.cast(tile - first, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, row = tl.arange(0, BLOCK_K), tl.arange(0, ROWS)
    p_weights = p_weight + n[:, None] * K + k[None, :]
    p_states = p_state + row[None, :] * K + k[:, None]
    m_n, m_row = n < N, row < rows
    sums = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for start in range(0, K, BLOCK_K):
        m_k = k < K - start
        weight = tl.load(p_weights + start, mask=m_n[:, None] & m_k[None, :], other=0, eviction_policy="evict_first")
        state = tl.load(p_states + start, mask=m_row[None, :] & m_k[:, None], other=0)
        sums = tl.dot(weight, state, sums, input_precision="ieee")
    if p_bias_0 is not None:
        sums += tl.load(p_bias_0 + n, mask=m_n & is_0, other=0).to(tl.float32)[:, None]
    if p_bias_1 is not None:
        sums += tl.load(p_bias_1 + n, mask=m_n & is_1, other=0).to(tl.float32)[:, None]
    if p_bias_2 is not None:
        sums += tl.load(p_bias_2 + n, mask=m_n & is_2, other=0).to(tl.float32)[:, None]
    tl.store(p_out + row[None, :] * N + n[:, None], sums, mask=m_n[:, None] & m_row[None, :])


def project_token(
    state: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """As `reference.project_token`, on a GPU."""
    outs = [state.new_empty((*state.shape[:-1], weight.shape[0])) for weight in weights]
    layers = [*zip(weights, biases, outs, strict=True)]
    for first in range(0, len(layers), _MOST_LAYERS):
        _launch(state, norm or (None, 0.0), residual, layers[first : first + _MOST_LAYERS])
    return outs


def _launch(
    state: torch.Tensor,
    norm: tuple[torch.Tensor | None, float],
    residual: torch.Tensor | None,
    layers: list[_Layer],
) -> None:
    inputs = state.shape[-1]
    rows = state.numel() // inputs
    missing = _MOST_LAYERS - len(layers)
    sizes = [weight.shape[0] for weight, _, _ in layers] + [0] * missing
    given = (*(part for layer in layers for part in layer), *[None] * (3 * missing))
    with torch.cuda.device_of(state):
        if rows == 1:
            before = (state, *norm, residual)
            launch(_project_token_kernel, (sum(sizes),), *before, *given, inputs, *sizes[:-1], **ONE_ROW)
        else:
            programs = sum(divided_up(size, _OUTPUTS) for size in sizes)
            launch(_project_rows_kernel, (programs,), state, *given, rows, inputs, *sizes, **several_rows(state.dtype))


def several_rows(dtype: torch.dtype) -> dict[str, Any]:
    """Tiles and options of launches for several rows."""
    return {
        "ROWS": MOST_ROWS,
        "BLOCK_N": _OUTPUTS,
        "BLOCK_K": _INPUT_BYTES // dtype.itemsize,
        "num_warps": _ROWS_WARPS,
        "num_stages": _STAGES,
    }
