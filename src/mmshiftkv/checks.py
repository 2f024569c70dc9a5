"""Checks of arguments; the messages name the argument, its value and what is allowed."""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

BACKENDS = ("auto", "triton", "torch")
PREFILL_MODES = ("single", "chunked")


@functools.lru_cache(typed=True)
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


def check_prefill(max_new_tokens: Any, prefill: Any, prompt_length: Any) -> None:
    """Raises TypeError or ValueError unless these say how a prompt is prefilled and stored."""
    check_choice("prefill", prefill, PREFILL_MODES)
    for name, value in (("max_new_tokens", max_new_tokens), ("prompt_length", prompt_length)):
        if value is not None:
            check_integer(name, value, minimum=1)
    if prompt_length is not None and prefill != "chunked":
        raise ValueError(f'prompt_length={prompt_length} is only for prefill="chunked"')


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


def check_real(name: str, value: Any, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless it `is_allowed` (never for NaN)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be {allowed}")
    if not is_allowed(float(value)):
        raise ValueError(f"{name}={value!r} must be {allowed}")
