"""Soft-capping of logits, as some models do it before the softmax."""

import math

import triton
import triton.language as tl

_LOG2_E = 1 / math.log(2)
_LEAST_EXACT = tl.constexpr(0.6)  # from here on the exponential of tanh leaves enough digits
_MINUS_TWO_LOG2_E = tl.constexpr(-2 * _LOG2_E)


def logit_scales(scaling: float, softcap: float | None) -> tuple[float, float | None]:
    """Factors that make logits in base 2 of products: on what `soft_capped` gives, and its `cap_scale`.

    Args:
        scaling: factor on the logits.
        softcap: logits x become softcap * tanh(x / softcap); None: they are not capped.
    """
    if softcap is None:
        return scaling * _LOG2_E, None
    return softcap * _LOG2_E, scaling / softcap


@triton.jit
def soft_capped(products, cap_scale):
    """tanh of cap_scale * products, to 3 units in the last place; without a `cap_scale` the products themselves.

    What is not finite stays as it is: it tells of a key or query that is not.
    """
    if cap_scale is not None:
        x = products * cap_scale
        size = tl.abs(x)
        rest = tl.exp2(size * _MINUS_TWO_LOG2_E)
        # Where the fraction would lose digits: x + x^3 p(x^2), fitted for the smallest relative error.
        square = x * x
        series = tl.fma(square, 0.015607946, -0.052207842)
        series = tl.fma(tl.fma(series, square, 0.13313010), square, -0.33332589)
        small = tl.fma(x * square, series, x)
        large = (1.0 - rest) / (1.0 + rest)
        capped = tl.where(size < _LEAST_EXACT, small, tl.where(x < 0, -large, large))
        products = tl.where(tl.abs(products) < float("inf"), capped, products)
    return products
