"""Numbers that are not finite count for nothing."""

import triton
import triton.language as tl


@triton.jit
def finite(x):
    """The same, but 0 for numbers that are not finite."""
    return tl.where(tl.abs(x) < float("inf"), x, tl.zeros_like(x))


@triton.jit
def load_rows(p_rows, row, m_row, stride_row, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (rows, BLOCK_D) of D numbers each; 0 for the others.  `m_row` is None if all rows are there."""
    d = tl.cast(tl.arange(0, BLOCK_D), tl.int64)
    p_tile = p_rows + tl.cast(row, tl.int64)[:, None] * stride_row + d[None, :] * stride_d
    if m_row is not None:
        rows = tl.load(p_tile, mask=m_row[:, None] & (d < D)[None, :], other=0.0)
    elif BLOCK_D != D:
        rows = tl.load(p_tile, mask=(d < D)[None, :], other=0.0)
    else:
        rows = tl.load(p_tile)
    return rows


@triton.jit
def load_finite(p_rows, row, m_row, stride_row, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """As `load_rows`, but 0 for numbers that are not finite."""
    return finite(load_rows(p_rows, row, m_row, stride_row, stride_d, D, BLOCK_D))
