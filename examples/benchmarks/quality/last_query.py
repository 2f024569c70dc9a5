"""ShiftKV with the last prompt token's query counting for more or for less than published."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from mmshiftkv.checks import tokens_to_keep
from mmshiftkv.methods.shiftkv import ShiftKV
from shiftkv_kernels import vote


@dataclass(frozen=True)
class WeightedLastQuery(ShiftKV):
    """ShiftKV whose real last query counts more or less than once.

    Attributes:
        in_groups: how often its attention mass enters that of each group, before the groups vote; published: 1.
        in_score: how often it enters the score beside the votes; published: 1.
        last_query_share: share of the tokens kept, rounded down, that is set aside for those with the most attention of
            the last query; the others are kept by their score. In [0, 1); published: 0.
    """

    in_groups: float = 1.0
    in_score: float = 1.0
    last_query_share: float = 0.0

    def score(self, layer: Any, summary: Any, keys: Any, values: Any, valid: Any) -> torch.Tensor:
        """Scores (B, H_kv, T), as `Method.score` says."""
        config = self.config
        mass, last_mass = self.attention_mass(layer, summary, keys, valid)
        proxies = config.num_proxies // config.num_groups
        # `mass` is (that of the proxies + that of the last query) / (1 + proxies), whose scale does not matter to a
        # vote; without the last query, rounding may leave a little less than nothing.
        mass = mass + (self.in_groups - 1) / (1 + proxies) * last_mass.unsqueeze(2)
        scores = vote(mass.clamp(min=0), config.mass, backend=config.backend) + self.in_score * last_mass
        if not self.last_query_share:
            return scores
        count = tokens_set_aside(self.last_query_share, tokens_to_keep(config.budget, keys.shape[2]))
        return raise_highest(scores, last_mass, count, config.num_groups + 1, valid)


def tokens_set_aside(share: float, count: int) -> int:
    """How many of `count` kept tokens a share in [0, 1) sets aside: rounded down, so at least one place is left.

    The share is the decimal number that was written: 0.29 of 100 is 29, not 28.
    """
    return math.floor(Fraction(repr(float(share))) * count)


def raise_highest(
    scores: torch.Tensor, mass: torch.Tensor, count: int, bonus: float, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Adds a bonus to the scores of the tokens with the most mass, so that they are kept by their score like others.

    The last token, which is kept anyway, never gets one, nor does padding: a row with fewer other tokens than `count`
    gives a bonus to each of them. Of tokens with equal mass the earlier one comes first.

    Args:
        scores: (B, H_kv, T) float32.
        mass: (B, H_kv, T), not negative.
        count: tokens to raise in each row, less than T.
        bonus: more than a score can be apart from the mass in it.
        valid: (B, T) bool, False for padding; None when there is none.

    Returns:
        The new scores, (B, H_kv, T).
    """
    if valid is not None:
        mass = mass.masked_fill(~valid[:, None, :], -1)
    highest = mass[..., :-1].sort(dim=-1, descending=True, stable=True).indices[..., :count]
    raised = torch.zeros_like(scores).scatter(-1, highest, bonus)
    return scores + (raised if valid is None else raised * valid[:, None, :])
