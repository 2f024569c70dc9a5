"""The score that counts values, and the values refitted to the kept tokens (method, steps 7 to 9)."""

import torch

from .attention import Columns, attended_tokens, attention_of, columns_of, finite
from .storing import gather_rows

_QUERIES_AT_ONCE = 16  # bounds the attention, (B, H, so many, T) float32

# A token on which all mass lies leaves this much to the others, so that its weight stays finite.
LARGEST_MEAN = 1 - 1e-3
# Attention to a kept token is at least this, so that its square is not taken for that of padding, whatever a device
# makes of numbers too small for float32.
LEAST_ATTENTION = 1e-18
# More of the mean mass of the proxies than this makes a token an attention sink; at most six tokens can have it.
SINK_MASS = 0.15
SINK_SCORE = 1e30
# Of the mean squared attention: tokens with less do not lower the penalty of a refit further.
LEAST_SHARE = 1e-6


def value_scores(
    proxy_queries: torch.Tensor,
    last_query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    last_weight: float = 1.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    has_sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each token gives to the output of the proxies and of the last query (method, steps 7 and 8).

    Args:
        proxy_queries: (B, H, N, D), rotated.
        last_query: (B, H, 1, D), the rotated query of the last prompt token.
        keys, values: (B, H_kv, T, D) and (B, H_kv, T, D_v), keys rotated; H is a multiple of H_kv.
        scaling: factor on the logits.
        last_weight: factor on what a token gives to the last query.
        softcap, sinks: as for `group_mass`.
        valid: (B, T) bool, False for padding; None when there is none.
        has_sink: (B, H_kv) bool, is set to whether any token of the KV head is an attention sink.

    Returns:
        (B, H_kv, T) float32, 0 for padding, NaN for tokens whose key or value is not finite.  Attention sinks, tokens
        with a mean mass of the proxies above `SINK_MASS`, have the highest scores, from `SINK_SCORE` on.
    """
    columns = columns_of(keys, scaling, valid, softcap=softcap, sinks=sinks)
    mean, square = _moments(proxy_queries, columns)
    output = mean.unsqueeze(2) @ finite(values.float())
    distance = torch.linalg.vector_norm(values.float() - output, dim=-1)
    shares = _per_remaining(mean, square) + last_weight * _per_remaining(*_moments(last_query, columns))
    scores = torch.where(mean > SINK_MASS, SINK_SCORE * (1 + mean), shares * distance)
    usable = keys.isfinite().all(dim=-1) & values.isfinite().all(dim=-1)
    scores = scores.masked_fill(~usable, torch.nan)
    scores = scores if valid is None else scores.masked_fill(~valid[:, None], 0)
    if has_sink is not None:
        has_sink.copy_((scores >= SINK_SCORE).any(dim=-1))
    return scores


def _moments(queries: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean square of the mass that (B, H, n, D) queries put on each token, over queries and query heads."""
    count = queries.shape[1] // columns.keys.shape[1] * queries.shape[2]
    sums = [
        (mass.sum(dim=(2, 3)), mass.square().sum(dim=(2, 3)))
        for mass in (attention_of(block, columns) for block in queries.split(_QUERIES_AT_ONCE, dim=2))
    ]
    mean, square = (sum(part) / count for part in zip(*sums, strict=True))
    return mean, square


def _per_remaining(mean: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Root mean square of the mass, over the mean mass of all else, which takes its place."""
    return square.sqrt() / (1 - mean.clamp(max=LARGEST_MEAN))


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """What queries behind a prompt get from it: nothing is causally masked (method, step 9).

    Args:
        queries: (B, H, n, D), rotated.
        keys, values: (B, H_kv, T, D) and (B, H_kv, T, D_v), keys rotated; H is a multiple of H_kv.
        scaling: factor on the logits.
        softcap, sinks: as for `group_mass`.
        valid: (B, T) bool, False for padding; None when there is none.

    Returns:
        (B, H, n, D_v) float32.  Tokens whose key is not finite are left out, as are numbers in values.
    """
    columns = columns_of(keys, scaling, valid, softcap=softcap, sinks=sinks)
    given = finite(values.float()).unsqueeze(2)
    outputs = [attention_of(block, columns) @ given for block in queries.split(_QUERIES_AT_ONCE, dim=2)]
    return torch.cat(outputs, dim=3).flatten(1, 2)


def refit_values(
    queries: torch.Tensor,
    outputs: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    *,
    scaling: float,
    ridge: float,
    steps: int,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    unchanged: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values with which the kept tokens give queries what the whole prompt gave them (method, step 9).

    Ridge regression of the missing output on the attention to the kept tokens, by conjugate gradients from the values
    as they are: each step lowers the squared error plus penalty, so that the error is never more than without.

    Args:
        queries: (B, H, n, D), rotated.
        outputs: (B, H, n, D_v) float32, as `attend` gives them for these queries.
        keys, values: (B, H_kv, T, D) and (B, H_kv, T, D_v), of the whole prompt.
        kept: (B, H_kv, C) int64, ascending.
        scaling: factor on the logits.
        ridge: penalty on changes, in units of the squared attention to a usual kept token, > 0.
        steps: of the conjugate gradients.
        softcap, sinks: as for `group_mass`.
        valid: (B, T) bool, False for padding; None when there is none.
        unchanged: (B, H_kv) bool, KV heads that keep their values; None: none does.

    Returns:
        (B, H_kv, C, D_v) of the dtype of the values.
    """
    kept_keys, kept_values = (gather_rows(part, kept) for part in (keys, values))
    attended = attended_tokens(keys, valid).gather(2, kept)
    columns = columns_of(kept_keys, scaling, attended, softcap=softcap, sinks=sinks)
    attention = attention_of(queries, columns).flatten(2, 3)
    # Not by the sum of the attention, which a learned sink may leave next to nothing of.
    is_finite = queries.isfinite().all(dim=-1, keepdim=True).unflatten(1, (kept.shape[1], -1)).flatten(2, 3)
    is_attended = columns.attended & is_finite
    attention = attention.clamp_min(LEAST_ATTENTION).where(is_attended, 0)
    missing = outputs.float().unflatten(1, (kept.shape[1], -1)).flatten(2, 3) - attention @ kept_values.float()
    gram = attention.transpose(-1, -2) @ attention
    squares = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    penalty = ridge * _usual(squares.squeeze(-1))[..., None, None]
    change = _conjugate_gradients(gram, squares, penalty, attention.transpose(-1, -2) @ missing, steps)
    if unchanged is not None:
        change = change.masked_fill(unchanged[..., None, None], 0)
    return (kept_values.float() + change).to(values.dtype)


def _usual(squares: torch.Tensor) -> torch.Tensor:
    """The geometric mean over the last dimension: a few tokens that all queries attend to hardly move it.

    What is 0 is left out, and what is next to nothing counts as a share of the mean.
    """
    is_counted = squares > 0
    count = is_counted.sum(dim=-1).clamp_min(1)
    least = LEAST_SHARE * squares.sum(dim=-1, keepdim=True) / count.unsqueeze(-1)
    logarithms = torch.maximum(squares, least).log().where(is_counted, 0)
    return (logarithms.sum(dim=-1) / count).exp()


def _conjugate_gradients(
    gram: torch.Tensor, squares: torch.Tensor, penalty: torch.Tensor, right: torch.Tensor, steps: int
) -> torch.Tensor:
    """Steps towards the solution x of (gram + penalty) x = right from x = 0, each column by itself.

    They are scaled by the diagonal of the matrix, `squares` + penalty, so that a token which all queries attend to does
    not hold up the others.
    """
    scaling = 1 / (squares + penalty).where(squares + penalty > 0, 1)
    solution, residual = torch.zeros_like(right), right
    scaled = direction = residual * scaling
    size = (residual * scaled).sum(dim=-2, keepdim=True)
    for _ in range(steps):
        product = gram @ direction + penalty * direction
        length = _ratio(size, (direction * product).sum(dim=-2, keepdim=True))
        solution = solution + length * direction
        residual = residual - length * product
        scaled = residual * scaling
        smaller = (residual * scaled).sum(dim=-2, keepdim=True)
        direction = scaled + _ratio(smaller, size) * direction
        size = smaller
    return solution


def _ratio(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left / right, 0 where right is not positive: where nothing is left, or nothing is there, nothing changes."""
    return torch.where(right > 0, left / right, 0)
