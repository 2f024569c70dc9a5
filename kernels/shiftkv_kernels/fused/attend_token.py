"""Attention of one token to the slots of a cache that are shown to it: hidden ones are not read.

Query heads read the keys and values of their group where they are.  Each program is one query head of one row, and goes
over all slots; exponentials are in base 2.
"""

import math

import torch
import triton
import triton.language as tl

from ..launching import launch
from ..sizes import next_power_of_2

# The best of twelve on an H100 for 320 slots, of one row and of eight, and for 768: slots at once, and warps.
_FEW_SLOTS, _SMALL, _LARGE = 512, (128, 4), (256, 8)


@triton.jit
def _attend_token_kernel(
    p_query, p_keys, p_values, p_mask, p_out, scale, heads, S,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    R: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, IS_ADDED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_V: tl.constexpr,
):  # fmt: skip
    """The output of one query head of one row."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row_offset, kv_offset = tl.cast(row, tl.int64), tl.cast(head // R, tl.int64)
    d, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D_V)
    query = tl.load(p_query + row_offset * stride_qb + head * stride_qh + d, mask=d < D, other=0).to(tl.float32)
    query *= scale
    p_keys += row_offset * stride_kb + kv_offset * stride_kh
    p_values += row_offset * stride_vb + kv_offset * stride_vh
    largest = -float("inf")
    total = 0.0
    outputs = tl.zeros((BLOCK_D_V,), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        shown = s < S
        if p_mask is not None:
            mask = tl.load(p_mask + row_offset * stride_mb + s, mask=shown, other=0)
            if not IS_ADDED:
                shown = shown & (mask != 0)
        places = tl.cast(s, tl.int64)[:, None]
        keys = tl.load(p_keys + places * stride_kt + d[None, :], mask=shown[:, None] & (d < D)[None, :], other=0)
        logits = tl.sum(keys.to(tl.float32) * query[None, :], 1)
        if IS_ADDED:
            logits += mask.to(tl.float32) * 1.4426950408889634  # log2(e)
        logits = tl.where(shown, logits, -float("inf"))
        highest = tl.maximum(largest, tl.max(logits, 0))
        # Before the first shown slot there is nothing to be relative to.
        base = tl.where(highest == -float("inf"), 0.0, highest)
        weights = tl.exp2(logits - base)
        values = tl.load(
            p_values + places * stride_vt + d_v[None, :], mask=shown[:, None] & (d_v < D_V)[None, :], other=0
        )
        shrunk = tl.exp2(largest - base)
        total = total * shrunk + tl.sum(weights, 0)
        outputs = outputs * shrunk + tl.sum(weights[:, None] * values.to(tl.float32), 0)
        largest = highest
    p_out += tl.cast(tl.program_id(0), tl.int64) * D_V
    tl.store(p_out + d_v, outputs / total, mask=d_v < D_V)


def attend_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """As `reference.attend_token`, on a GPU."""
    batch, heads, _, head_dim = query.shape
    value_dim = values.shape[3]
    is_bool = mask is not None and mask.dtype == torch.bool
    out = query.new_empty((batch, heads, 1, value_dim))
    slots_at_once, warps = _SMALL if keys.shape[2] <= _FEW_SLOTS else _LARGE
    with torch.cuda.device_of(query):
        launch(
            _attend_token_kernel,
            (batch * heads,),
            query,
            keys,
            values,
            mask.view(torch.uint8) if mask is not None and is_bool else mask,
            out,
            scale * math.log2(math.e),
            heads,
            keys.shape[2],
            *query.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            R=heads // keys.shape[1],
            D=head_dim,
            D_V=value_dim,
            IS_ADDED=mask is not None and not is_bool,
            BLOCK_S=slots_at_once,
            BLOCK_D=next_power_of_2(head_dim),
            BLOCK_D_V=next_power_of_2(value_dim),
            num_warps=warps,
        )
    return out
