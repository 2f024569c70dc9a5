"""The rotation of proxies and last query to their positions (step 3), in one launch."""

import torch
import triton
import triton.language as tl

from ..launching import launch
from ..sizes import divided_up, next_power_of_2

_ROWS_PER_PROGRAM = 32


@triton.jit
def _advance(p_cos, p_sin, p_step_cos, p_step_sin, m_d, m_step):
    """cos and sin of a position that lies a step, whose cos and sin are given, after another."""
    cos = tl.cast(tl.load(p_cos, mask=m_d, other=0.0), tl.float32)[None, :]
    sin = tl.cast(tl.load(p_sin, mask=m_d, other=0.0), tl.float32)[None, :]
    step_cos = tl.load(p_step_cos, mask=m_step, other=1.0)
    step_sin = tl.load(p_step_sin, mask=m_step, other=0.0)
    return cos * step_cos - sin * step_sin, sin * step_cos + cos * step_sin


@triton.jit
def _rotate_kernel(
    p_queries,
    p_last,
    p_cos,
    p_sin,
    p_step_cos,
    p_step_sin,
    p_rotated,
    p_rotated_last,
    N,
    H,
    G_SIZE,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_lb,
    stride_lh,
    stride_cb,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotates BLOCK_N proxies of one head or, the last program of a head, the last query."""
    pair = tl.cast(tl.program_id(1), tl.int64)
    batch, head = pair // H, pair % H
    is_last = tl.program_id(0) == tl.num_programs(0) - 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.where(is_last, tl.arange(0, BLOCK_N), n)
    m_n = n < tl.where(is_last, 1, N)
    p_from = tl.where(
        is_last, p_last + batch * stride_lb + head * stride_lh, p_queries + batch * stride_qb + head * stride_qh
    )
    p_from += tl.cast(n, tl.int64)[:, None] * stride_qn
    p_to = tl.where(is_last, p_rotated_last + pair * D, p_rotated + pair * N * D)
    p_to += tl.cast(n, tl.int64)[:, None] * D

    HALF: tl.constexpr = ROTATED // 2
    d = tl.arange(0, BLOCK_HALF)
    m_d = d < HALF
    mask = m_n[:, None] & m_d[None, :]
    low = tl.cast(tl.load(p_from + d[None, :], mask=mask), tl.float32)
    high = tl.cast(tl.load(p_from + HALF + d[None, :], mask=mask), tl.float32)
    p_cos += batch * stride_cb
    p_sin += batch * stride_cb
    # The last query's own position is no step away.
    step = (n % G_SIZE)[:, None] * ROTATED
    m_step = (n < tl.where(is_last, 0, N))[:, None] & m_d[None, :]
    o_step = step + d[None, :]
    cos, sin = _advance(p_cos + d, p_sin + d, p_step_cos + o_step, p_step_sin + o_step, m_d, m_step)
    tl.store(p_to + d[None, :], low * cos - high * sin, mask=mask)
    d += HALF
    o_step = step + d[None, :]
    cos, sin = _advance(p_cos + d, p_sin + d, p_step_cos + o_step, p_step_sin + o_step, m_d, m_step)
    tl.store(p_to + d[None, :], high * cos + low * sin, mask=mask)
    if ROTATED < D:
        rest = ROTATED + tl.arange(0, BLOCK_REST)
        mask = m_n[:, None] & (rest < D)[None, :]
        tl.store(p_to + rest[None, :], tl.load(p_from + rest[None, :], mask=mask), mask=mask)


def rotate_queries(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    step_cos: torch.Tensor,
    step_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.rotate_queries`, on a GPU."""
    batch, heads, count, head_dim = proxy_queries.shape
    steps, rotated = step_cos.shape
    if proxy_queries.stride(-1) != 1:
        proxy_queries = proxy_queries.contiguous()
    if last_query.stride(-1) != 1:
        last_query = last_query.contiguous()
    turned = proxy_queries.new_empty(proxy_queries.shape)
    turned_last = last_query.new_empty(last_query.shape)
    with torch.cuda.device_of(proxy_queries):
        launch(
            _rotate_kernel,
            (divided_up(count, _ROWS_PER_PROGRAM) + 1, batch * heads),
            proxy_queries,
            last_query,
            cos.contiguous(),
            sin.contiguous(),
            step_cos.contiguous(),
            step_sin.contiguous(),
            turned,
            turned_last,
            count,
            heads,
            steps,
            *proxy_queries.stride()[:3],
            *last_query.stride()[:2],
            rotated if cos.shape[0] > 1 else 0,
            D=head_dim,
            ROTATED=rotated,
            BLOCK_N=_ROWS_PER_PROGRAM,
            BLOCK_HALF=next_power_of_2(rotated // 2),
            BLOCK_REST=next_power_of_2(max(head_dim - rotated, 1)),
        )
    return turned, turned_last
