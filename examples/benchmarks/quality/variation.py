"""What variations.py measures: the published settings, and one change at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.quality.variations_report import PUBLISHED

if TYPE_CHECKING:
    from mmshiftkv import PrefillSelectionCache

LAST_QUERY_SHARES = (0.125, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Variation:
    """The published settings with something changed: settings of the config, or weights of `WeightedLastQuery`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def make_cache(self, model: Any, budget: int) -> "PrefillSelectionCache":
        """A new cache for one `generate` call."""
        from benchmarks.quality.last_query import WeightedLastQuery
        from mmshiftkv import PrefillSelectionCache, ShiftKVConfig
        from mmshiftkv.methods.shiftkv import ShiftKV

        config = ShiftKVConfig.for_model(model, budget=budget, **self.settings)
        method = WeightedLastQuery(config, **self.weights) if self.weights else ShiftKV(config)
        return PrefillSelectionCache(model, method, budget)


def _of(setting: str, values: Sequence[Any], **fixed: Any) -> list[Variation]:
    return [Variation(f"{setting}={value}", {setting: value, **fixed}) for value in values]


def all_variations() -> list[Variation]:
    """The published settings first, then one change at a time.

    Other seeds change nothing but the noise: they show how much a difference may come from the samples alone.  The
    stride stays at 32 where the groups, which it follows by default, become more or fewer.
    """
    return [
        Variation(PUBLISHED),
        *_of("seed", [1, 2]),
        *_of("gamma", [0.5, 1.0, 2.0, 5.0, 20.0, 30.0]),
        *_of("num_proxies", [128, 2048]),
        *_of("num_groups", [8, 16, 64, 128], future_stride=32),
        *_of("mass", [0.5, 0.8, 0.9, 0.99]),
        *_of("stats_window", [32, 128]),
        *_of("future_stride", [1, 8]),
        *_of("last_token_layers", [2]),
        *(Variation(f"last_query_share={share}", weights={"last_query_share": share}) for share in LAST_QUERY_SHARES),
        # All places but that of the last token: what its attention chooses without any votes.
        Variation("last query alone", weights={"last_query_share": 0.99}),
        Variation("last query not in the groups", weights={"in_groups": 0.0}),
        Variation("last query 16 times in the groups", weights={"in_groups": 16.0}),
        Variation("last query not in the score", weights={"in_score": 0.0}),
        Variation("last query 8 times in the score", weights={"in_score": 8.0}),
        Variation("last query 32 times in the score", weights={"in_score": 32.0}),
    ]
