"""Every number of the method in one place, validated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import PreTrainedModel

from ..checks import BACKENDS, check_budget, check_choice, check_integer, check_prefill, check_real

# Published settings (method, "Published settings"); families not named here use the defaults, those of Qwen2.5-VL.
_LLAVA = {"num_groups": 16, "stats_window": 512, "last_token_layers": 2}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {"llava": _LLAVA, "llava_next": _LLAVA}

# Found on generated documents with the embedded model, see examples/benchmarks/results/value_variations.md.
PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "value-aware": {"score": "values", "last_query_weight": 4.0, "refit_queries": 512},
}
SCORES = ("votes", "values")
_FINITE = "a finite number >= 0"


@dataclass(frozen=True, kw_only=True)
class ShiftKVConfig:
    """Settings of MM-ShiftKV; the defaults are those published for Qwen2.5-VL.

    Attributes:
        budget: tokens kept per KV head and layer (int), or the share of the prompt's columns, padding included, that is
            kept, rounded up (float in (0, 1]).
        gamma: factor on the standard deviation of the proxies, >= 0; 0 makes every proxy the mean.  One number for all
            decoder layers, or a sequence with one for each (kept as a tuple), such as `Calibration.gamma()`.
        num_proxies: proxies N, a multiple of `num_groups`.
        num_groups: groups G, each of which votes.
        score: "votes" of the groups, as published, or "values": what a token's value gives to the proxies' outputs.
        mass: with "votes", share of a group's attention mass that its votes must hold, in (0, 1].
        last_query_weight: with "values", factor on what a token gives to the last prompt token's own query, >= 0.
        refit_queries: the kept values are refitted so that at least so many proxies of each KV head, those of its query
            heads together, get what the whole prompt gave them.  0: values are stored as they are.
        refit_ridge: penalty on changed values, in units of the squared attention to a usual kept token, > 0.
        stats_window: statistics come from the last so many tokens; None: from all.
        future_stride: distance in positions between the proxies of a group; None: `num_groups`.
        last_token_layers: so many first layers use the last token's hidden state at the next 16 positions as proxies,
            instead of samples.
        seed: seed of the samples, from 0 to 2**32 - 1; torch's global random state is neither read nor changed.
        max_new_tokens: room for so many tokens behind what is kept of the prompt, in storage that stays where it is, so
            that `generate` compiles decoding; None: storage grows, and decoding is eager.
        prefill: "single" when one forward pass holds the whole prompt, "chunked" when several do.
        prompt_length: only with `prefill="chunked"`: columns of the whole prompt, which tell that it is complete.
            None: `end_prompt()` of the cache tells it.
        backend: "auto" (Triton kernels on a GPU, plain torch elsewhere), "triton" or "torch".

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range; the message names the field, the value and what is allowed.
    """

    budget: int | float
    gamma: float | Sequence[float] = 10.0
    num_proxies: int = 512
    num_groups: int = 32
    score: str = "votes"
    mass: float = 0.95
    last_query_weight: float = 1.0
    refit_queries: int = 0
    refit_ridge: float = 3.0
    stats_window: int | None = None
    future_stride: int | None = None
    last_token_layers: int = 0
    seed: int = 0
    max_new_tokens: int | None = None
    prefill: str = "single"
    prompt_length: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        object.__setattr__(self, "gamma", checked_gamma(self.gamma))  # a list would make the config unhashable
        check_choice("score", self.score, SCORES)
        check_mass(self.mass)
        check_real("last_query_weight", self.last_query_weight, lambda value: 0 <= value < math.inf, _FINITE)
        check_real("refit_ridge", self.refit_ridge, lambda value: 0 < value < math.inf, "a finite number > 0")
        for name in ("num_proxies", "num_groups"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("stats_window", "future_stride"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        for name in ("last_token_layers", "refit_queries"):
            check_integer(name, getattr(self, name), minimum=0)
        check_integer("seed", self.seed, minimum=0, maximum=2**32 - 1)
        if self.num_proxies % self.num_groups:
            raise ValueError(f"num_proxies={self.num_proxies} must be a multiple of num_groups={self.num_groups}")
        check_choice("backend", self.backend, BACKENDS)
        check_prefill(self.max_new_tokens, self.prefill, self.prompt_length)

    @classmethod
    def for_model(cls, model: PreTrainedModel, *, preset: str = "published", **settings: Any) -> "ShiftKVConfig":
        """The published settings of the model's family, with a preset and `settings` (at least `budget`) on top.

        Args:
            model: the model.
            preset: "published", or "value-aware", which counts values and refits those that are kept.
            settings: fields of the config.

        Raises:
            TypeError: `budget` is missing, or a field is unknown; the message lists the fields.
            ValueError: an unknown preset, or as the class says.
        """
        check_choice("preset", preset, tuple(PRESETS))
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise TypeError(f"unknown setting {', '.join(unknown)}; allowed are {', '.join(known)}")
        if "budget" not in settings:
            raise TypeError("budget is missing: an int (tokens per KV head) or a float in (0, 1] (share of the prompt)")
        family = FAMILY_SETTINGS.get(model.config.model_type, {})
        return cls(**{**family, **PRESETS[preset], **settings})

    def check_layers(self, count: int) -> None:
        """Raises ValueError if there is one gamma per layer, but not for `count` decoder layers."""
        if isinstance(self.gamma, tuple) and len(self.gamma) != count:
            raise ValueError(
                f"gamma has {len(self.gamma)} numbers, but the model has {count} decoder layers: give one number for "
                "each of them, or one for all"
            )

    def gamma_of(self, layer: int) -> float:
        """The gamma of one decoder layer; ValueError if there is none for it."""
        if not isinstance(self.gamma, Sequence):
            return self.gamma
        if layer >= len(self.gamma):
            raise ValueError(f"gamma has {len(self.gamma)} numbers, none for decoder layer {layer}")
        return self.gamma[layer]

    def replace(self, **settings: Any) -> "ShiftKVConfig":
        """A copy with some fields changed, validated again."""
        return replace(self, **settings)


def checked_gamma(gamma: Any) -> Any:
    """One gamma as it is, several as a tuple.

    Raises:
        TypeError, ValueError: unless each is a finite number >= 0, and there is at least one.
    """
    allowed = _FINITE
    if isinstance(gamma, str | bytes) or not isinstance(gamma, Sequence):
        check_real("gamma", gamma, lambda value: 0 <= value < math.inf, f"{allowed}, or one for each decoder layer")
        return gamma
    if not gamma:
        raise ValueError(f"gamma={gamma!r} must be {allowed}, or one for each decoder layer")
    for layer, value in enumerate(gamma):
        check_real(f"gamma[{layer}]", value, lambda value: 0 <= value < math.inf, allowed)
    return tuple(gamma)


def check_mass(value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a number in (0, 1]."""
    check_real("mass", value, lambda mass: 0 < mass <= 1, "a number in (0, 1]")
