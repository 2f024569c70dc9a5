"""The plain torch meaning of every operation; also the path taken where there is no Triton.

Symbols: B batch, H query heads, H_kv key/value heads, T prompt tokens, D head dim, N proxies, G groups.
Sums and softmax are float32 whatever the inputs are.
"""

from .attention import group_mass, vote
from .decoding import attend_token, project_gate, project_token
from .proxies import draw_samples, gaussian_noise, prompt_statistics, rotate_queries, token_statistics
from .storing import gather, keep_best
from .values import attend, refit_values, value_scores

__all__ = [
    "attend",
    "attend_token",
    "draw_samples",
    "gather",
    "gaussian_noise",
    "group_mass",
    "keep_best",
    "project_gate",
    "project_token",
    "prompt_statistics",
    "refit_values",
    "rotate_queries",
    "token_statistics",
    "value_scores",
    "vote",
]
