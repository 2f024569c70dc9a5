"""Checks of the operations' arguments; the messages name the argument, what it is and what it must be."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_MOST_LOOKS = 4096


def check_shape(name: str, tensor: torch.Tensor, meaning: str, sizes: Sequence[int | None]) -> None:
    """Raises ValueError unless `tensor` has these sizes (None: any), which `meaning` names, as in "(B, T)"."""
    shape = tensor.shape
    if len(shape) != len(sizes) or any(size not in (None, got) for size, got in zip(sizes, shape, strict=True)):
        known = ", ".join("any" if size is None else str(size) for size in sizes)
        wanted = meaning if all(size is None for size in sizes) else f"{meaning} = ({known})"
        raise ValueError(f"{name} has shape {tuple(shape)}, must be {wanted}")


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Raises ValueError unless the dtype of `tensor` is allowed."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {tensor.dtype}, must be {' or '.join(map(str, allowed))}")


def check_device(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {like.device} like {like_name}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless the elements of `tensor` follow one another in memory."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")


def check_alike(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raises ValueError unless `tensor` is contiguous, of the dtype of `like`, and on its device."""
    check_dtype(name, tensor, like.dtype)
    check_device(name, tensor, like_name, like)
    check_contiguous(name, tensor)


def check_pair(name: str, pair: object) -> None:
    """Raises TypeError unless `pair` is a tuple of two tensors."""
    parts = pair if isinstance(pair, tuple) else ()
    if len(parts) != 2 or not all(isinstance(part, torch.Tensor) for part in parts):
        kinds = f" ({', '.join(type(part).__name__ for part in parts)})" if isinstance(pair, tuple) else ""
        raise TypeError(f"{name} is a {type(pair).__name__}{kinds}, must be a tuple of two tensors")


def check_valid(valid: torch.Tensor | None, like_name: str, like: torch.Tensor, batch: int, tokens: int) -> None:
    """Raises ValueError unless `valid` is None or a (B, T) bool mask on the device of `like`."""
    if valid is not None:
        check_shape("valid", valid, "(B, T)", (batch, tokens))
        check_dtype("valid", valid, torch.bool)
        check_device("valid", valid, like_name, like)


def check_flag(not_finite: torch.Tensor | None, like_name: str, like: torch.Tensor) -> None:
    """Raises ValueError unless `not_finite` is None or a (1,) bool flag on the device of `like`."""
    if not_finite is not None:
        check_shape("not_finite", not_finite, "(1,)", (1,))
        check_dtype("not_finite", not_finite, torch.bool)
        check_device("not_finite", not_finite, like_name, like)


def check_out(out: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, count: int) -> None:
    """Raises TypeError or ValueError unless `out` is storage for `count` tokens of these keys and values."""
    check_pair("out", out)
    check_shape("out[0]", out[0], "(B, H_kv, S, D)", (*keys.shape[:2], None, keys.shape[3]))
    check_shape("out[1]", out[1], "(B, H_kv, S, D_v)", (*out[0].shape[:3], values.shape[3]))
    if out[0].shape[2] < count:
        raise ValueError(
            f"out has {out[0].shape[2]} slots, must have at least as many as the {count} tokens of indices"
        )
    check_alike("out[0]", out[0], "keys", keys)
    check_alike("out[1]", out[1], "values", values)


def check_positive(name: str, value: float, most: float = math.inf) -> None:
    """Raises ValueError unless 0 < value <= most, and finite."""
    if not 0 < value <= most or value == math.inf:
        limit = "" if most == math.inf else f" and at most {most}"
        raise ValueError(f"{name}={value!r} must be more than 0{limit}, and finite")


def check_logits(
    name: str, queries: torch.Tensor, scaling: float, softcap: float | None, sinks: torch.Tensor | None
) -> None:
    """Raises ValueError unless logits can be made of the queries `name`, (B, H, n, D).

    `scaling` and `softcap` must be positive and finite, `sinks` a floating (H,) on the queries' device.
    """
    check_positive("scaling", scaling)
    if softcap is not None:
        check_positive("softcap", softcap)
    if sinks is not None:
        check_shape("sinks", sinks, "(H,)", (queries.shape[1],))
        if not sinks.is_floating_point():
            raise ValueError(f"sinks is {sinks.dtype}, must be of a floating dtype")
        check_device("sinks", sinks, name, queries)


def checked_once(
    check: Callable[..., None],
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Has an operation's arguments checked before it runs, but only once for those that look the same.

    All layers of a model have tensors of the same shapes.

    Args:
        check: takes what the operation takes, but for `backend`, and raises what its documentation says.
    """

    def decorate(operation: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        passed: set[Any] = set()

        @functools.wraps(operation)
        def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            looks = (*map(_look, args), *kwargs, *map(_look, kwargs.values()))
            if looks not in passed:
                check(*args, **{name: value for name, value in kwargs.items() if name != "backend"})
                if len(passed) >= _MOST_LOOKS:
                    passed.clear()
                passed.add(looks)
            return operation(*args, **kwargs)

        return checked

    return decorate


def _look(argument: Any) -> Any:
    """What the checks see of an argument, and its type: they tell 1 from True and 1.0."""
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype, argument.device, argument.is_contiguous()
    if isinstance(argument, tuple | list):
        return type(argument), *map(_look, argument)
    return type(argument), argument
