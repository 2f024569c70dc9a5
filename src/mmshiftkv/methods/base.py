"""What a method is: from what a layer saw of a prompt to a score for each of its tokens."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..model.hooks import LayerInput
from ..model.queries import AttentionLayer


@dataclass(frozen=True)
class Read:
    """All that something depends on, besides a layer's keys and values, how it makes logits, and the padding.

    Attributes:
        tensors: those that are read.
        others: all else, but for the numbers.
        numbers: what is passed to kernels under these names of their parameters.
    """

    tensors: tuple[torch.Tensor, ...]
    others: Hashable
    numbers: Mapping[str, float] = field(default_factory=dict)


class Method(ABC):
    """A way to score the tokens of a prompt.

    A prompt is shown to `observe` in one piece or, when it is prefilled in chunks, in several.  When it is complete,
    `prepare` gets what the last call returned, and `score` and `refit` what `prepare` returned.  A method keeps nothing
    of a prompt in itself, so that one object serves all layers, prompts and copies of a cache.
    """

    @property
    def protected(self) -> int:
        """How many tokens are kept whatever their scores are; by default 1, the last token, which every cache keeps.

        A method that scores some tokens above all others returns their number here, and caches refuse a smaller budget.
        """
        return 1

    def check(self, layer: AttentionLayer) -> None:
        """Raises ValueError if the method cannot score the prompts of this layer; by default it can."""
        return None

    @abstractmethod
    def observe(self, layer: AttentionLayer, inputs: LayerInput, earlier: Any) -> Any:
        """What `score` will need of these tokens and of the earlier ones (`earlier` is None at first)."""

    def prepare(self, layer: AttentionLayer, summary: Any, valid: torch.Tensor | None) -> Any:
        """What `score` and `refit` both need of a complete prompt; by default what `observe` returned for it.

        Args:
            layer: the attention layer.
            summary: what `observe` returned for the whole prompt.
            valid: (B, T) bool, False for padding; None when there is none.
        """
        return summary

    def read(self, layer: AttentionLayer, summary: Any) -> Read | None:
        """What `score` and `refit` read of a summary, and `prepare` if it is still to come.

        Where they do nothing but call operations of `shiftkv_kernels` and project states by `layer`, what they did for
        one layer can be repeated for others, and for other prompts of as many tokens with an equal method.  None, the
        default: they may do anything, and are called for every layer.

        Args:
            layer: the attention layer.
            summary: what `observe` returned; where None was said of that, what `prepare` returned.
        """
        return None

    @abstractmethod
    def score(
        self, layer: AttentionLayer, summary: Any, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores (B, H_kv, T) float32, not negative, higher is better; a score that is not finite comes last.

        Args:
            layer: the attention layer.
            summary: what `prepare` returned.
            keys, values: (B, H_kv, T, D) and (B, H_kv, T, D_v), keys rotated.
            valid: (B, T) bool, False for padding; None when there is none.
        """

    def refit(
        self,
        layer: AttentionLayer,
        summary: Any,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """New values (B, H_kv, C, D_v) for the kept tokens, of the dtype of `values`; None, the default, leaves them.

        Args:
            layer, summary, keys, values, valid: as for `score`.
            kept: (B, H_kv, C) int64, the columns that are kept, ascending.
        """
        return None


def what_is_read(method: Method, layer: AttentionLayer, summary: Any) -> Read | None:
    """`method.read(...)`; None where a subclass has another method than those that it speaks of."""
    return method.read(layer, summary) if _speaks_of_all(type(method)) else None


@functools.cache
def _speaks_of_all(kind: type[Method]) -> bool:
    read, *others = (
        next(base for base in kind.__mro__ if name in vars(base)) for name in ("read", "prepare", "score", "refit")
    )
    return kind.__hash__ is not None and all(issubclass(read, other) for other in others)


def check_method(method: Any) -> None:
    """Raises TypeError unless `method` is a `Method`."""
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method={method.__name__} is a class; give an object of it: {method.__name__}(...)")
    if not isinstance(method, Method):
        raise TypeError(
            f"method={method!r} must be an object of a class that inherits from mmshiftkv.Method and has its methods "
            "observe and score"
        )


def checked_scores(method: Method, scores: Any, keys: torch.Tensor) -> torch.Tensor:
    """The scores that `method` gave for keys (B, H_kv, T, D).

    Raises:
        TypeError, ValueError: they are no float32 tensor (B, H_kv, T) on the device of the keys.
    """
    name = f"{type(method).__name__}.score"
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"{name} returned a {type(scores).__name__}, must return a tensor")
    if scores.shape != keys.shape[:3] or scores.dtype != torch.float32 or scores.device != keys.device:
        raise ValueError(
            f"{name} returned {scores.dtype} {tuple(scores.shape)} on {scores.device}, must return torch.float32 "
            f"(B, H_kv, T) = {tuple(keys.shape[:3])} on {keys.device}"
        )
    return scores


def checked_values(method: Method, refitted: Any, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | None:
    """The values that `method` refitted to the kept columns (B, H_kv, C) of values (B, H_kv, T, D_v), if it did.

    Raises:
        TypeError, ValueError: they are no tensor (B, H_kv, C, D_v) of the dtype and on the device of the values.
    """
    if refitted is None:
        return None
    name = f"{type(method).__name__}.refit"
    if not isinstance(refitted, torch.Tensor):
        raise TypeError(f"{name} returned a {type(refitted).__name__}, must return a tensor or None")
    shape = (*kept.shape, values.shape[3])
    if refitted.shape != shape or refitted.dtype != values.dtype or refitted.device != values.device:
        raise ValueError(
            f"{name} returned {refitted.dtype} {tuple(refitted.shape)} on {refitted.device}, must return "
            f"{values.dtype} (B, H_kv, C, D_v) = {tuple(shape)} on {values.device}"
        )
    return refitted
