"""Storage at addresses that stay, for compiled decoding: CUDA graphs read and write where they were recorded."""

import copy
import itertools
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from .base import Pair

# By model: the buffers of a cache that is gone, and when that cache was made.  The model's next cache uses them again,
# so that the CUDA graphs recorded with them can be replayed; with others they would have to be recorded again.  A model
# has one such set, of its latest cache: a cache whose decoding was traced is freed by the garbage collector alone, long
# after caches that were made after it, and the graphs have been recorded with the buffers of those by then.
_unused: "weakref.WeakKeyDictionary[nn.Module, tuple[int, dict[Hashable, torch.Tensor]]]" = weakref.WeakKeyDictionary()
_times = itertools.count()


class Buffers:
    """All that the layers of one cache hold: keys and values, states, and how many tokens these are.

    Args:
        owner: a module of the model that the cache is for.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = weakref.ref(owner)
        _, self._tensors = _unused.pop(owner, (0, {}))
        weakref.finalize(self, _leave, self._owner, next(_times), self._tensors).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Buffers":
        owner = self._owner()
        if owner is None:
            raise RuntimeError("the model of this cache is gone")
        copied = Buffers(owner)
        memo[id(self)] = copied
        for key, mine in self._tensors.items():
            copied.holding(key, mine)
        return copied

    def tensor(self, key: Hashable, like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The tensor of that name, with dtype and device of `like`; what is in it is unspecified."""
        held, wanted = self._tensors.get(key), (shape, like.dtype, like.device)
        if held is None or (held.shape, held.dtype, held.device) != wanted:
            held = self._tensors[key] = _new_buffer(*wanted)
        # Models may write states of linear attention with gradients; those end with their cache.
        return held.detach_()

    def holding(self, key: Hashable, states: torch.Tensor) -> torch.Tensor:
        """The tensor of that name, with a copy of `states` in it."""
        return self.tensor(key, states, states.shape).copy_(states.detach())

    def of_layer(self, index: int, keys: torch.Tensor, values: torch.Tensor, slots: int) -> Pair:
        """The slots of layer `index`, (B, H_kv, slots, D), for states like these; what is in it is unspecified."""
        key_slots, value_slots = (torch.Size((*part.shape[:2], slots, part.shape[3])) for part in (keys, values))
        return self.tensor((index, "keys"), keys, key_slots), self.tensor((index, "values"), values, value_slots)

    def holding_layer(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """The slots of layer `index` with copies of `keys` and `values`, (B, H_kv, slots, D), in them.

        The same shapes find the same buffers again, and graphs that were recorded with them stay good.
        """
        return self.holding((index, "keys"), keys), self.holding((index, "values"), values)


class Lengths:
    """How many tokens each of some layers holds, and has seen.

    These layers all hold the same number of tokens, so two numbers serve them all.  They are on the device: what is
    compiled must not depend on numbers in Python that change from prompt to prompt.

    Args:
        buffers: those of the cache.
        name: of these layers.

    Attributes:
        filled: tokens held, 0-d int64; set by `start`.
        seen: tokens seen, 0-d int64; set by `start`.
        taken: slots that are filled or that a pass was promised, at least `filled`; known without asking the device.
    """

    filled: torch.Tensor
    seen: torch.Tensor

    def __init__(self, buffers: Buffers, name: Hashable) -> None:
        self.buffers = buffers
        self._name = name
        self.taken = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Lengths":
        copied = Lengths(copy.deepcopy(self.buffers, memo), self._name)
        memo[id(self)] = copied
        if hasattr(self, "filled"):
            copied._use(self.filled)
        copied.taken = self.taken
        return copied

    def _use(self, like: torch.Tensor) -> None:
        names = ((self._name, part) for part in ("filled", "seen"))
        self.filled, self.seen = (self.buffers.tensor(name, like, like.shape) for name in names)

    def start(self, stored: int, seen: int, device: torch.device) -> None:
        """Sets the numbers of tokens, after a prompt."""
        self._use(torch.empty((), dtype=torch.int64, device=device))
        self.filled.fill_(stored)
        self.seen.fill_(seen)
        self.taken = stored

    def advance(self, tokens: int) -> None:
        """Counts tokens that all layers have been given; this is compiled."""
        self.filled.add_(tokens)
        self.seen.add_(tokens)

    def take_back(self, tokens: int) -> None:
        """Forgets the last tokens."""
        self.filled.sub_(tokens)
        self.seen.sub_(tokens)
        self.taken -= tokens


def _new_buffer(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A tensor made in inference mode could not be written outside of it, and storage outlives its prompt.
    with torch.inference_mode(False):
        buffer = torch.empty(shape, dtype=dtype, device=device)
    torch._dynamo.mark_static_address(buffer)
    return buffer


def _leave(owner: "weakref.ref[nn.Module]", made: int, tensors: dict[Hashable, torch.Tensor]) -> None:
    model = owner()
    if model is not None and (model not in _unused or _unused[model][0] < made):
        _unused[model] = made, tensors
