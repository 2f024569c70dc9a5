"""ShiftKV with another weight of the last prompt token's query."""

from dataclasses import dataclass
from typing import Any

import torch

from mmshiftkv.methods.shiftkv import ShiftKV
from shiftkv_kernels import vote


@dataclass(frozen=True)
class WeightedLastQuery(ShiftKV):
    """ShiftKV whose real last query counts more or less than once.

    Attributes:
        in_groups: how often its attention mass enters that of each group, before the groups vote; published: 1.
        in_score: how often it enters the score beside the votes; published: 1.
    """

    in_groups: float = 1.0
    in_score: float = 1.0

    def score(self, layer: Any, summary: Any, keys: Any, values: Any, valid: Any) -> torch.Tensor:
        """Scores (B, H_kv, T), as `Policy.score` says."""
        mass, last_mass = self.attention_mass(layer, summary, keys, valid)
        proxies = self.config.num_proxies // self.config.num_groups
        # `mass` is (that of the proxies + that of the last query) / (1 + proxies), whose scale does not matter to a
        # vote; without the last query, rounding may leave a little less than nothing.
        mass = mass + (self.in_groups - 1) / (1 + proxies) * last_mass.unsqueeze(2)
        return vote(mass.clamp(min=0), self.config.mass) + self.in_score * last_mass
