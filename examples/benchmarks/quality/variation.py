"""What variations.py measures: a preset's settings, and one change at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.quality.variations_report import PUBLISHED, VALUE_AWARE

if TYPE_CHECKING:
    from mmshiftkv import PrefillSelectionCache

LAST_QUERY_SHARES = (0.125, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Variation:
    """A preset with something changed.

    Attributes:
        name: what it is called in tables.
        settings: of the config.
        weights: of `WeightedLastQuery`, in place of ShiftKV.
        parts: of `VariedValues`, in place of ShiftKV.
        preset: the settings that the others come on top of.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    preset: str = PUBLISHED

    @property
    def changes(self) -> dict[str, Any]:
        """All that differs from the preset."""
        return {**self.settings, **self.weights, **self.parts}

    def make_cache(self, model: Any, budget: int) -> "PrefillSelectionCache":
        """A new cache for one `generate` call."""
        from benchmarks.quality.last_query import WeightedLastQuery
        from benchmarks.quality.varied_values import VariedValues
        from mmshiftkv import PrefillSelectionCache, ShiftKVConfig
        from mmshiftkv.methods.shiftkv import ShiftKV

        config = ShiftKVConfig.for_model(model, preset=self.preset, budget=budget, **self.settings)
        method = ShiftKV(config)
        if self.weights:
            method = WeightedLastQuery(config, **self.weights)
        if self.parts:
            method = VariedValues(config, **self.parts)
        return PrefillSelectionCache(model, method, budget)


def _of(setting: str, values: Sequence[Any], preset: str = PUBLISHED, **fixed: Any) -> list[Variation]:
    return [Variation(f"{setting}={value}", {setting: value, **fixed}, preset=preset) for value in values]


def _with(name: str, settings: dict[str, Any] | None = None, **parts: Any) -> Variation:
    return Variation(name, settings or {}, parts=parts, preset=VALUE_AWARE)


def variations_of(baseline: str) -> list[Variation]:
    """The variations of a preset, itself first."""
    return {PUBLISHED: published_variations, VALUE_AWARE: value_variations}[baseline]()


def value_variations() -> list[Variation]:
    """The value-aware preset first, then one change at a time; the published settings among them.

    The stride stays at 32 where the number of proxies, and with it that of the groups, changes.
    """
    counts = (32, 64, 128, 256, 1024)
    return [
        Variation(VALUE_AWARE, preset=VALUE_AWARE),
        Variation(PUBLISHED),
        _with("no refit", {"refit_queries": 0}),
        *_of("seed", [1, 2], VALUE_AWARE),
        *_of("gamma", [0.5, 1.0, 2.0, 5.0, 20.0], VALUE_AWARE),
        *(_with(f"num_proxies={n}", {"num_proxies": n, "num_groups": n // 16, "future_stride": 32}) for n in counts),
        *_of("future_stride", [1, 8], VALUE_AWARE),
        *_of("last_query_weight", [0.0, 1.0, 2.0, 8.0, 16.0], VALUE_AWARE),
        *_of("refit_queries", [64, 128, 256, 1024, 2048], VALUE_AWARE),
        *_of("refit_ridge", [0.1, 0.3, 1.0, 10.0, 30.0], VALUE_AWARE),
        *(_with(f"refit to the last {n} tokens", last_tokens=n) for n in (8, 16)),
        *(_with(f"weight: {name}", weight=name) for name in ("length", "projected", "none")),
        *(_with(f"statistic: {name}", statistic=name) for name in ("mean", "largest", "votes")),
        *(_with(f"divided by the remaining mass: {name}", remaining=name) for name in ("none", "query")),
        _with("mass averaged over groups", in_groups=True),
        _with("mass averaged over groups, votes", in_groups=True, statistic="votes"),
        _with("first 4 tokens always kept", first_tokens=4),
    ]


def published_variations() -> list[Variation]:
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
