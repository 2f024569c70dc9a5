"""Asks an attention module for its queries: its own code runs, with another attention function in its place.

The attention modules of transformers project, norm, gate, split and rotate as they like, and then hand queries, keys
and values to an attention function that they look up by name.  Here the module's `forward` runs in a copy of its
globals in which the lookup gives a function of ours.  Nothing is registered, and nothing of the module or its config
changes, so that other threads and libraries meet nothing of it.
"""

import contextlib
import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .arguments import CACHE_ARGUMENTS
from .offload import with_weights
from .positions import Positions

_LOOKUP = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
# What attention modules call the argument that takes a cache.
CACHES = (*CACHE_ARGUMENTS, "layer_past")
# Where transformers defines what it puts in the place of a forward pass whose weights several processes share.
_SHARING = "transformers.distributed."
# Arguments that decoders leave at their defaults.
_UNUSED = (
    "encoder_attention_mask",
    "encoder_hidden_states",
    "head_mask",
    "key_value_states",
    "output_attentions",
    "use_cache",
)
_GIVEN = (
    "attention_mask",
    "cache_position",
    "hidden_states",
    "layer_idx",
    "position_embeddings",
    "position_ids",
    "shared_kv_states",
)
_signatures: "weakref.WeakKeyDictionary[types.FunctionType, inspect.Signature]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Handed:
    """What an attention module hands to its attention function.

    Attributes:
        query: (B, H, n, D), rotated.
        keys, values: (B, H_kv, T, D) and (B, H_kv, T, D_v), of the tokens that are attended to.
        mask: the mask it hands on.
        options: what it passes by name besides: scaling, softcap and so on.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: Any
    options: dict[str, Any]

    def in_float32(self) -> "Handed":
        """The same queries, keys and values in float32, or as they are where they are no less exact."""
        states = (self.query, self.keys, self.values)
        query, keys, values = (state.to(torch.promote_types(state.dtype, torch.float32)) for state in states)
        return replace(self, query=query, keys=keys, values=values)


AttentionFunction = Callable[[Handed], torch.Tensor]


class _HandedOver(Exception):
    """Ends a module's forward pass once its attention function has been called."""


class StoredTokens:
    """Stands in for a cache that holds tokens already, and keeps what a module gives it.

    Args:
        columns: (n,) int64, the columns of the tokens that the module is asked about.
        keys, values: what `update` returns, in place of what it is given; None: just that.
    """

    given: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(
        self,
        columns: torch.Tensor | None,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> None:
        self._columns, self._keys, self._values = columns, keys, values

    def get_seq_length(self, *_: Any, **__: Any) -> Any:
        """What, added to 0, 1, 2 and so on, gives the columns."""
        if self._columns is None:
            return 0
        return self._columns - torch.arange(len(self._columns), device=self._columns.device)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that it holds."""
        self.given = keys, values
        if self._keys is None or self._values is None:
            return keys, values
        return self._keys, self._values


class _KeysGiven(StoredTokens):
    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.given = keys, values
        raise _HandedOver


class _Lookup:
    """Stands in for the attention functions of transformers: by whatever name, it gives one and the same."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __getitem__(self, name: Any) -> Callable[..., Any]:
        return self._function

    def get_interface(self, *_: Any, **__: Any) -> Callable[..., Any]:
        return self._function

    get = get_interface


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of an attention module's forward pass, in order."""
    return tuple(_signature(module).parameters)


def takes_query_by_function(module: nn.Module) -> bool:
    """Whether the module looks up an attention function, so that it can be asked."""
    function = _forward_function(module)
    return function is not None and _LOOKUP in function.__code__.co_names and _LOOKUP in function.__globals__


def unknown_arguments(module: nn.Module) -> list[str]:
    """The arguments of its forward pass of which it is not known what to give."""
    known = (*_GIVEN, *_UNUSED, *CACHES)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, one in _signature(module).parameters.items() if name not in known and one.kind not in kinds]


# The compiler must not trace into the twin of a function that it may have compiled itself.
@torch.compiler.disable
def ask(
    module: nn.Module,
    hidden_states: torch.Tensor,
    positions: Positions,
    *,
    cache: StoredTokens | None = None,
    attention: AttentionFunction | None = None,
) -> Handed:
    """What an attention module hands to its attention function, for tokens with these hidden states and positions.

    Args:
        module: the attention module.
        hidden_states: (B, n, d), its input.
        positions: of the n tokens.
        cache: what it takes for its cache; by default it has none but for the columns.
        attention: is called in place of the attention function, and the forward pass runs to its end; None: it ends
            with that call.

    Raises:
        RuntimeError: it calls no attention function, or several times.
        Exception: whatever the module's own code raises.
    """
    handed: list[Handed] = []

    def function(asked: Any, query: Any, keys: Any, values: Any, attention_mask: Any, *_: Any, **options: Any) -> Any:
        handed.append(Handed(query, keys, values, attention_mask, options))
        if attention is None:
            raise _HandedOver
        return attention(handed[-1]), None

    forward = _with_attention_function(module, function)
    with with_weights(module), contextlib.suppress(_HandedOver):
        forward(**arguments_for(module, hidden_states, positions, cache))
    if len(handed) != 1:
        raise RuntimeError(f"it calls an attention function {len(handed)} times, not once")
    return handed[0]


@torch.compiler.disable
def keys_given(module: nn.Module, hidden_states: torch.Tensor, positions: Positions) -> torch.Tensor:
    """The keys (B, H_kv, n, D) that an attention module gives to its cache, for tokens as in `ask`.

    Raises:
        RuntimeError: it gives it none.
        Exception: whatever the module's own code raises.
    """
    cache = _KeysGiven(positions.columns)
    with contextlib.suppress(_HandedOver):
        module.forward(**arguments_for(module, hidden_states, positions, cache))
    if cache.given is None:
        raise RuntimeError("it does not pass its keys to the cache's update")
    return cache.given[0]


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The attention function in plain torch of the module's own file, if it has one."""
    function = _forward_function(module)
    return None if function is None else function.__globals__.get(_EAGER)


def own_module(module: nn.Module) -> nn.Module:
    """The module itself, of one that `torch.compile` has wrapped."""
    return getattr(module, "_orig_mod", module)


def _forward_function(module: nn.Module) -> types.FunctionType | None:
    """The function that computes the module's forward pass, without what wraps it."""
    module = own_module(module)
    forward: Any = vars(module).get("forward")
    # accelerate puts a forward on the module that moves its weights, which a running pass has done already; tensor
    # parallelism one that brings in this process's part of them, as `with_weights` does.
    is_for_weights = hasattr(module, "_hf_hook") or str(getattr(forward, "__module__", None)).startswith(_SHARING)
    if forward is None or is_for_weights:
        forward = type(module).forward
    function = inspect.unwrap(getattr(forward, "__func__", forward))
    return function if isinstance(function, types.FunctionType) else None


def _signature(module: nn.Module) -> inspect.Signature:
    function = _forward_function(module)
    if function is None:
        return inspect.signature(own_module(module).forward)
    if function not in _signatures:
        whole = inspect.signature(function)
        named = [one for name, one in whole.parameters.items() if name != "self"]
        _signatures[function] = whole.replace(parameters=named)
    return _signatures[function]


def _with_attention_function(module: nn.Module, attention: Callable[..., Any]) -> Callable[..., Any]:
    function = _forward_function(module)
    assert function is not None
    names = {**function.__globals__, _LOOKUP: _Lookup(attention), _EAGER: attention}
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(twin, own_module(module))


def arguments_for(
    module: nn.Module, hidden_states: torch.Tensor, positions: Positions, cache: StoredTokens | None
) -> dict[str, Any]:
    """The arguments with which the module is called for these tokens, without a mask."""
    names = parameters_of(module)
    if cache is None and positions.columns is not None:
        cache = StoredTokens(positions.columns)
    everything: dict[str, Any] = {
        "hidden_states": hidden_states,
        "attention_mask": None,
        "position_embeddings": positions.factors,
        "position_ids": positions.ids,
        "cache_position": positions.columns,
        "layer_idx": getattr(module, "layer_idx", None),
        # Some layers leave their keys there for others; not those of made-up tokens.
        "shared_kv_states": {},
        **dict.fromkeys(CACHES, cache),
    }
    return {name: value for name, value in everything.items() if name in names}
