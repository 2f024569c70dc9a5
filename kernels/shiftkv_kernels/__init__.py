"""The operations of a prompt-token selection, and what a decoding step is made of; knows torch and Triton alone.

Every operation is stated in `reference` in plain torch; on a GPU the kernels in `fused` take its place.
"""

from .decoding_ops import attend_token, project_gate, project_token
from .ops import (
    attend,
    draw_samples,
    gather,
    group_mass,
    keep_best,
    refit_values,
    rotate_queries,
    token_statistics,
    value_scores,
    vote,
)
from .sizes import MOST_ROWS

__all__ = [
    "MOST_ROWS",
    "attend",
    "attend_token",
    "draw_samples",
    "gather",
    "group_mass",
    "keep_best",
    "project_gate",
    "project_token",
    "refit_values",
    "rotate_queries",
    "token_statistics",
    "value_scores",
    "vote",
]
