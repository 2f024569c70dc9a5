"""The tokens to keep (step 6): a selection instead of a sort, written in the tokens' own order."""

import torch
import triton
import triton.language as tl

from ..launching import launch
from .search import ROW_OPTIONS, find_cut, load_ranks, row_options

# The kept indices are written piece by piece: running counts over a whole long row would take most of the time.
_PIECE = 4096


@triton.jit(do_not_specialize=["T", "C", "stride_vb"])
def _keep_best_kernel(
    p_scores,
    p_valid,
    p_kept,
    p_not_finite,
    T,
    C,
    H_KV,
    stride_vb,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The indices of the C - 1 best entries of a row but its last, ascending, and then the last."""
    row = tl.cast(tl.program_id(0), tl.int64)
    p_row, p_out = p_scores + row * T, p_kept + row * C
    if p_valid is not None:
        p_valid += row // H_KV * stride_vb
    ranks, weights = load_ranks(p_row, p_valid, 0, T, BLOCK, True)
    # Ranks of finite scores, behind those of padding, are at most this.
    low, high = tl.cast(-1, tl.int32), 0x7F800000 + T
    target = tl.cast(C - 1, tl.float32)
    rank, index = find_cut(ranks, weights, p_row, p_valid, T, target, low, high, BLOCK, True, RESIDENT)
    written = tl.cast(0, tl.int32)
    least = 0 if p_valid is None else T  # the rank of what is not finite
    is_finite = tl.load(p_row + T - 1) < float("inf")
    for start in range(0, T, PIECE):
        t = start + tl.arange(0, PIECE)
        piece, _ = load_ranks(p_row, p_valid, start, T, PIECE, True)
        is_kept = tl.cast((piece > rank) | ((piece == rank) & (t <= index)), tl.int32)
        place = written + tl.cumsum(is_kept, 0) - 1
        tl.store(p_out + place, tl.cast(t, tl.int64), mask=is_kept != 0)
        written += tl.sum(is_kept, 0)
        is_finite &= tl.sum(tl.where(piece == least, 1, 0), 0) == 0
    tl.store(p_out + C - 1, tl.cast(T - 1, tl.int64))
    if p_not_finite is not None:
        # All rows that store anything store the same.
        tl.store(p_not_finite, tl.cast(1, tl.uint8), mask=is_finite == 0)


def keep_best(
    scores: torch.Tensor,
    count: int,
    valid: torch.Tensor | None = None,
    *,
    not_finite: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.keep_best`, on a GPU."""
    batch, kv_heads, tokens = scores.shape
    scores = scores.contiguous()
    mask = None if valid is None else valid.contiguous().view(torch.uint8)
    kept = scores.new_empty((batch, kv_heads, count), dtype=torch.int64)
    with torch.cuda.device_of(scores):
        launch(
            _keep_best_kernel,
            (batch * kv_heads,),
            scores,
            mask,
            kept,
            None if not_finite is None else not_finite.view(torch.uint8),
            tokens,
            count,
            kv_heads,
            tokens,
            others=lambda: ({"PIECE": _PIECE, **each} for each in ROW_OPTIONS),
            PIECE=_PIECE,
            **row_options(tokens),
        )
    return kept
