"""The operations of a prompt-token selection, and the projections of a decoding step; knows torch and Triton alone.

Every operation is stated in `reference` in plain torch; on a GPU the kernels in `fused` take its place.
"""

from .ops import (
    draw_samples,
    gather,
    group_mass,
    keep_best,
    project_token,
    rotate_queries,
    token_statistics,
    vote,
)

__all__ = [
    "draw_samples",
    "gather",
    "group_mass",
    "keep_best",
    "project_token",
    "rotate_queries",
    "token_statistics",
    "vote",
]
