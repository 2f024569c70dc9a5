"""A model's rotary embedding, as far as positions to come need it."""

import copy
import functools
import inspect
import weakref
from typing import Any

import torch
from torch import nn

from .positions import Factors, Positions, map_factors

_Key = tuple[Any, ...]
# What `Rotary.steps` made of a rotary embedding: layers and caches of a model share it.
_known_steps: "weakref.WeakKeyDictionary[nn.Module, dict[_Key, Factors]]" = weakref.WeakKeyDictionary()
# Whether a rotary embedding gives sin and then cos.
_sin_first: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


class Rotary:
    """The rotary embedding of one layer; nothing of the model's is called or changed by it.

    Args:
        module: the decoder's rotary embedding; None if it has none.
        layer_type: the layer's type, where the embedding has frequencies for each; one that it has none for is not
            rotated.
    """

    def __init__(self, module: nn.Module | None, layer_type: str | None) -> None:
        kind: Any = type(module)
        takes_type = module is not None and _takes_layer_type(kind)
        rope_types = getattr(module, "rope_type", None)
        has_none = takes_type and isinstance(rope_types, dict) and layer_type not in rope_types
        self.module = None if has_none else module
        self._layer_type = layer_type
        self._arguments = (layer_type,) if takes_type else ()
        # Equal for layers whose factors are the same at the same positions.  No module in it: positions are copied with
        # what was made of them.
        self.key = (id(self.module), layer_type)

    def factors(self, positions: torch.Tensor) -> Factors:
        """Factors (1, n, rotary dim) float32 or complex64 of positions (1, n), with the frequencies now in use.

        A copy of the module answers: dynamic embeddings recompute their frequencies when called, which a look at a few
        positions must not cause.
        """
        if self.module is None:
            return None
        still: Any = copy.copy(self.module)
        rope_type: Any = getattr(self.module, "rope_type", "default")
        still.rope_type = dict.fromkeys(rope_type, "default") if isinstance(rope_type, dict) else "default"
        device = next(self.module.buffers(), positions).device
        where = positions.to(device)
        sections: Any = getattr(self.module, "mrope_section", None)
        if sections is not None:
            where = where[None].expand(len(sections), -1, -1)
        found = type(self.module).forward(still, torch.zeros(1, device=device), where, *self._arguments)
        found = found if isinstance(found, torch.Tensor) else tuple(found)
        return map_factors(lambda factor: factor.to(positions.device), found)

    def ahead(self, last: Positions, *, count: int, stride: int) -> Positions:
        """`count` later positions, `stride` apart, after one position.

        All axes of a multimodal rotary embedding advance together, as they do for text.

        Args:
            last: of one token.

        Returns:
            Positions of `count` tokens, whose factors have the dtype of those of `last`.
        """
        ids, columns = (_ahead(part, count, stride) for part in (last.ids, last.columns))
        if last.factors is None:
            return Positions(None, ids, columns)
        steps = self.steps(count, stride, _first(last.factors).device)
        if isinstance(last.factors, torch.Tensor):
            assert isinstance(steps, torch.Tensor)
            return Positions((last.factors * steps).to(last.factors.dtype), ids, columns)
        assert isinstance(steps, tuple)
        cos, sin = self._cos_first(last.factors)
        step_cos, step_sin = steps
        wide_cos, wide_sin = cos.float(), sin.float()
        later_cos = (wide_cos * step_cos - wide_sin * step_sin).to(cos.dtype)
        later_sin = (wide_sin * step_cos + wide_cos * step_sin).to(sin.dtype)
        return Positions(self._cos_first((later_cos, later_sin)), ids, columns)

    def neutral(self, factors: Factors) -> Factors:
        """Factors of the same form that rotate nothing."""
        if factors is None:
            return None
        if isinstance(factors, torch.Tensor):
            return torch.ones_like(factors)
        cos, sin = self._cos_first(factors)
        return self._cos_first((torch.ones_like(cos), torch.zeros_like(sin)))

    def cos_and_sin(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin, in this order, where the factors are such a pair; None otherwise."""
        return self._cos_first(factors) if isinstance(factors, tuple) else None

    def steps(self, count: int, stride: int, device: torch.device) -> Factors:
        """Factors of the angles between a position and the `count` next ones, cos first: (1, count, rotary dim)."""
        assert self.module is not None
        known = _known_steps.setdefault(self.module, {})
        # A model that is converted or moved gets other buffers.
        own = self.module._buffers.values()
        buffers = tuple((buffer.data_ptr(), buffer.dtype) for buffer in own if buffer is not None)
        key = (self._layer_type, count, stride, device, buffers)
        if key not in known:
            steps = self._computed_steps(torch.arange(count + 1, device=device)[None] * stride)
            if not self._is_static:
                return steps
            known[key] = steps
        return known[key]

    def _computed_steps(self, distances: torch.Tensor) -> Factors:
        try:
            found = self.factors(distances)
        except IndexError:  # a table of positions that is not that long
            return self._composed_steps(distances[:, 1:])
        # Some embeddings scale their factors to scale the logits; at position 0 that is all that is left.
        if isinstance(found, torch.Tensor):
            return found[:, 1:] / found[:, :1]
        assert found is not None
        cos, sin = self._cos_first(found)
        return cos[:, 1:] / cos[:, :1], sin[:, 1:] / cos[:, :1]

    def _composed_steps(self, distances: torch.Tensor) -> Factors:
        """cos and sin of these distances (1, n), from the angle of a single position."""
        found = self.factors(torch.ones_like(distances[:, :1]))
        assert isinstance(found, tuple)
        cos, sin = (factor.double() for factor in self._cos_first(found))
        angles = torch.atan2(sin, cos) * distances[..., None]
        return angles.cos().float(), angles.sin().float()

    def _cos_first(self, factors: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return (factors[1], factors[0]) if self._is_sin_first else factors

    @property
    def _is_sin_first(self) -> bool:
        """Whether the embedding gives sin and then cos, which GPT-J's does: sin is 0 at position 0."""
        if self.module is None:
            return False
        if self.module not in _sin_first:
            at_zero = self.factors(torch.zeros(1, 1, dtype=torch.long))
            _sin_first[self.module] = isinstance(at_zero, tuple) and not bool(at_zero[0].any())
        return _sin_first[self.module]

    @property
    def _is_static(self) -> bool:
        rope_type: Any = getattr(self.module, "rope_type", "default")
        kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
        return not any(kind == "longrope" or "dynamic" in kind for kind in kinds)


@functools.cache
def _takes_layer_type(kind: Any) -> bool:
    return "layer_type" in inspect.signature(kind.forward).parameters


def _first(factors: tuple[torch.Tensor, torch.Tensor] | torch.Tensor) -> torch.Tensor:
    return factors if isinstance(factors, torch.Tensor) else factors[0]


def _ahead(place: torch.Tensor | None, count: int, stride: int) -> torch.Tensor | None:
    return None if place is None else place + torch.arange(1, count + 1, device=place.device) * stride


def rotary_of(decoder: nn.Module, config: Any, index: int) -> nn.Module | None:
    """The rotary embedding that a decoder gives layer `index` the factors of; None if it has none.

    Args:
        decoder: the module that holds the blocks.
        config: of the text model.
        index: of the layer.

    Raises:
        ValueError: it has several, and it is not known which the layer gets.
    """
    bases = getattr(config, "layer_rope_theta", None)
    several: Any = getattr(decoder, "rotary_embs", None)
    if several is not None and bases is not None:  # Granite with one base a layer, 0 for none
        found = [one for one in several if one.config.rope_parameters["rope_theta"] == bases[index]]
        return found[0] if found else None
    found = [module for module in decoder.children() if "rotary" in type(module).__name__.lower()]
    scaled = getattr(config, "rope_scaling_layers", None)
    if len(found) == 2 and scaled is not None:  # Molmo 2
        return found[0] if index in scaled else found[1]
    if len(found) > 1:
        raise ValueError(f"model: {type(decoder).__name__} is not supported: it has {len(found)} rotary embeddings")
    return found[0] if found else None
