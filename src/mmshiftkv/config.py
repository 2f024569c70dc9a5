"""Every number of the method in one place, validated."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from transformers import PreTrainedModel

BACKENDS = ("auto", "triton", "torch")
PREFILL_MODES = ("single", "chunked")

# Published settings (method, "Published settings"); families not named here use the defaults, those of Qwen2.5-VL.
_LLAVA = {"num_groups": 16, "stats_window": 512, "last_token_layers": 2}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {"llava": _LLAVA, "llava_next": _LLAVA}


@dataclass(frozen=True, kw_only=True)
class ShiftKVConfig:
    """Settings of MM-ShiftKV; the defaults are those published for Qwen2.5-VL.

    Attributes:
        budget: tokens kept per KV head and layer (int), or the share of the prompt's columns, padding included, that is
            kept, rounded up (float in (0, 1]).
        gamma: factor on the standard deviation of the proxies, >= 0; 0 makes every proxy the mean.
        num_proxies: proxies N, a multiple of `num_groups`.
        num_groups: groups G, each of which votes.
        mass: share of a group's attention mass that its votes must hold, in (0, 1].
        stats_window: statistics come from the last so many tokens; None: from all.
        future_stride: distance in positions between the proxies of a group; None: `num_groups`.
        last_token_layers: so many first layers use the last token's hidden state at the next 16 positions as proxies,
            instead of samples.
        seed: seed of the samples, from 0 to 2**32 - 1; torch's global random state is neither read nor changed.
        max_new_tokens: tokens to reserve storage for behind the prompt; None: storage grows.
        prefill: "single" when one forward pass holds the whole prompt, "chunked" when several do.
        prompt_length: only with `prefill="chunked"`: columns of the whole prompt, which tell that it is complete.
            None: the first forward pass with a single token ends the prompt.
        backend: "auto" (Triton kernels on a GPU, plain torch elsewhere), "triton" or "torch".

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range; the message names the field, the value and what is allowed.
    """

    budget: int | float
    gamma: float = 10.0
    num_proxies: int = 512
    num_groups: int = 32
    mass: float = 0.95
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
        check_real("gamma", self.gamma, lambda value: 0 <= value < math.inf, "a finite number >= 0")
        check_mass(self.mass)
        for name in ("num_proxies", "num_groups"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("stats_window", "future_stride", "max_new_tokens", "prompt_length"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        check_integer("last_token_layers", self.last_token_layers, minimum=0)
        check_integer("seed", self.seed, minimum=0, maximum=2**32 - 1)
        if self.num_proxies % self.num_groups:
            raise ValueError(f"num_proxies={self.num_proxies} must be a multiple of num_groups={self.num_groups}")
        check_choice("prefill", self.prefill, PREFILL_MODES)
        check_choice("backend", self.backend, BACKENDS)
        if self.prompt_length is not None and self.prefill != "chunked":
            raise ValueError(f'prompt_length={self.prompt_length} is only for prefill="chunked"')

    @classmethod
    def for_model(cls, model: PreTrainedModel, **settings: Any) -> "ShiftKVConfig":
        """The published settings of the model's family, with `settings` (at least `budget`) on top.

        Raises:
            TypeError: `budget` is missing, or a field is unknown; the message lists the fields.
            ValueError: as the class says.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise TypeError(f"unknown setting {', '.join(unknown)}; allowed are {', '.join(known)}")
        if "budget" not in settings:
            raise TypeError("budget is missing: an int (tokens per KV head) or a float in (0, 1] (share of the prompt)")
        family = FAMILY_SETTINGS.get(model.config.model_type, {})
        return cls(**{**family, **settings})

    def replace(self, **settings: Any) -> "ShiftKVConfig":
        """A copy with some fields changed, validated again."""
        return replace(self, **settings)


def tokens_to_keep(budget: int | float, tokens: int) -> int:
    """How many of `tokens` prompt columns a budget keeps: at most all; a share is rounded up.

    A share is read as the decimal number that was written: 0.07 of 100 is 7, not 8.
    """
    count = budget if isinstance(budget, Integral) else math.ceil(Fraction(repr(float(budget))) * tokens)
    return min(int(count), tokens)


def check_budget(budget: Any) -> None:
    """Raises TypeError or ValueError unless `budget` is an int >= 1 or a float in (0, 1]."""
    allowed = "an int >= 1 (tokens per KV head) or a float in (0, 1] (share of the prompt)"
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"budget={budget!r} must be {allowed}")
    if not (int(budget) >= 1 if isinstance(budget, Integral) else 0 < float(budget) <= 1):
        raise ValueError(f"budget={budget!r} must be {allowed}")


def check_integer(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
    """Raises TypeError or ValueError unless `value` is an int between the two limits."""
    allowed = f"an int >= {minimum}" if maximum is None else f"an int from {minimum} to {maximum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} must be {allowed}")
    if int(value) < minimum or (maximum is not None and int(value) > maximum):
        raise ValueError(f"{name}={value!r} must be {allowed}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def check_mass(value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a number in (0, 1]."""
    check_real("mass", value, lambda mass: 0 < mass <= 1, "a number in (0, 1]")


def check_real(name: str, value: Any, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless it `is_allowed` (never for NaN)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be {allowed}")
    if not is_allowed(float(value)):
        raise ValueError(f"{name}={value!r} must be {allowed}")
