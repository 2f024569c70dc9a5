"""Products of two tiles, in the way that suits their dtype."""

import torch
import triton
import triton.language as tl

_FEATURES_AT_ONCE = tl.constexpr(16)


def whole_features(states: torch.Tensor) -> torch.Tensor:
    """Queries or keys (..., D) with zeros behind their features, up to a multiple of 16.

    With a D of 40 in 16 bits, Triton 3.6 makes code for Hopper that gives wrong outputs.
    """
    missing = -states.shape[-1] % _FEATURES_AT_ONCE.value
    return torch.nn.functional.pad(states, (0, missing)) if missing else states


@triton.jit
def tile_products(b_kept, p_kept, m_kept, kept_step, p_passing, m_passing, passing_step, D: tl.constexpr):
    """Products of the kept rows with a tile of passing columns, unscaled.

    Either the kept rows are there as a tile on the chip, b_kept, or they are read, as the columns are, a few of the D
    features at a time: exact float32 products are made by ordinary arithmetic, which has no room for all of them.
    """
    if b_kept is None:
        d = tl.arange(0, _FEATURES_AT_ONCE)
        products = tl.zeros([p_kept.shape[0], p_passing.shape[1]], tl.float32)
        for start in range(0, D, _FEATURES_AT_ONCE):
            m_d = start + d < D
            m_columns = True if m_passing is None else m_passing[None, :]
            kept_part = tl.load(
                p_kept + (start + d)[None, :] * kept_step, mask=m_kept[:, None] & m_d[None, :], other=0.0
            )
            passing_part = tl.load(
                p_passing + (start + d)[:, None] * passing_step, mask=m_columns & m_d[:, None], other=0.0
            )
            products = tl.dot(kept_part, passing_part, products, input_precision="ieee")
    else:
        d = tl.arange(0, b_kept.shape[1])
        p_tile = p_passing + d[:, None] * passing_step
        if m_passing is not None:
            b_passing = tl.load(p_tile, mask=m_passing[None, :] & (d < D)[:, None], other=0.0)
        elif b_kept.shape[1] != D:
            b_passing = tl.load(p_tile, mask=(d < D)[:, None], other=0.0)
        else:
            b_passing = tl.load(p_tile)
        products = tl.dot(b_kept, b_passing)
    return products
