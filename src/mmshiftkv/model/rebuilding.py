"""Queries rebuilt from an attention module's parts: its projection, norm and rotation."""

import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from .asking import own_module
from .positions import Factors
from .precision import PLAIN_DTYPES

_NUMBERS = (int, float, bool, str)
_PLAIN = (nn.Parameter, torch.Tensor, type(None))
# Other packages put kernels of their own into norms, whose launches nobody but they can see.
_KNOWN_CODE = ("torch.nn.", "transformers.models.")


class Rebuilder:
    """Makes the queries of an attention module with a standard query projection.

    Raises:
        ValueError: the module lacks a part; the message names it.
    """

    def __init__(self, module: nn.Module) -> None:
        for name in ("head_dim", "q_proj", "k_proj"):
            if getattr(module, name, None) is None:
                raise ValueError(f"it has no attribute {name!r}")
        self._module: Any = module
        function = getattr(sys.modules[type(own_module(module)).__module__], "apply_rotary_pos_emb", None)
        if function is None:
            raise ValueError("its module defines no apply_rotary_pos_emb")
        self._rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]] = function

    def project(self, letter: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """Queries ("q") or keys ("k") before rotation, (B, H, n, D), of (B, n, d): projection, bias and norm."""
        projection = getattr(self._module, f"{letter}_proj")
        weight = getattr(projection, "weight", None)
        if weight is not None and weight.dtype in PLAIN_DTYPES:
            hidden_states = hidden_states.to(weight.dtype)  # the model's own may be run under autocast
        projected = projection(hidden_states)
        norm = self._norm(letter)
        weight = getattr(norm, "weight", None)
        # OLMo 2 and others norm all heads at once, Qwen 3 and others each head by itself.
        norm_is_joint = weight is not None and weight.ndim == 1 and weight.shape[0] == projected.shape[-1]
        if norm is not None and norm_is_joint:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self._module.head_dim))
        if norm is not None and not norm_is_joint:
            heads = norm(heads)
        return heads.transpose(1, 2)

    def read(self) -> tuple[tuple[torch.Tensor, ...], Hashable] | None:
        """What `project("q", ...)` reads of the module, tensors and all else; None where it may do anything."""
        projection, norm = self._module.q_proj, self._norm("q")
        if type(projection) is not nn.Linear or not _is_plain(projection) or not (norm is None or _is_plain(norm)):
            return None
        weights = (projection.weight,) if projection.bias is None else (projection.weight, projection.bias)
        if norm is None:
            return weights, self._module.head_dim
        numbers = tuple(pair for pair in vars(norm).items() if isinstance(pair[1], _NUMBERS))
        return (*weights, *norm.parameters(), *norm.buffers()), (self._module.head_dim, type(norm), numbers)

    def _norm(self, letter: str) -> nn.Module | None:
        modules = self._module._modules
        return modules.get(f"{letter}_norm") or modules.get(f"{letter}_layernorm")

    def rotate(self, states: torch.Tensor, factors: Factors) -> torch.Tensor:
        """Rotates (B, H, n, D) by a pair of factors, (B or 1, n, rotary dim), as the model itself does."""
        if factors is None or not getattr(self._module, "use_rope", True):
            return states
        assert isinstance(factors, tuple)
        return self._rotate(states, states, *factors)[0]


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module is running the code of its class on plain tensors of its own, and no more."""
    own = vars(module)
    return (
        not (own["_modules"] or own["_forward_hooks"] or own["_forward_pre_hooks"])
        and "forward" not in own
        and "_hf_hook" not in own
        and type(module).forward.__module__.startswith(_KNOWN_CODE)
        and all(type(part) in _PLAIN for part in (*own["_parameters"].values(), *own["_buffers"].values()))
    )
