"""Storage at addresses that stay, for compiled decoding: CUDA graphs read and write where they were recorded."""

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
_unused: "weakref.WeakKeyDictionary[nn.Module, tuple[int, dict[Hashable, Pair]]]" = weakref.WeakKeyDictionary()
_times = itertools.count()


class Buffers:
    """Keys and values of all selected layers of one cache, and how many tokens they hold and have seen.

    The layers all hold the same number of tokens, so two numbers serve them all.  They are on the device: what is
    compiled must not depend on numbers in Python that change from prompt to prompt.

    Args:
        owner: a module of the model that the cache is for.

    Attributes:
        filled: tokens held, 0-d int64; set by `start`.
        seen: tokens seen, 0-d int64; set by `start`.
        taken: slots that are filled or that a pass was promised, at least `filled`; known without asking the device.
    """

    filled: torch.Tensor
    seen: torch.Tensor

    def __init__(self, owner: nn.Module) -> None:
        self._owner = weakref.ref(owner)
        _, self._pairs = _unused.pop(owner, (0, {}))
        weakref.finalize(self, _leave, self._owner, next(_times), self._pairs).atexit = False
        self.taken = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Buffers":
        owner = self._owner()
        if owner is None:
            raise RuntimeError("the model of this cache is gone")
        copied = Buffers(owner)
        memo[id(self)] = copied
        for key, pair in self._pairs.items():
            for mine, theirs in zip(pair, copied._pair(key, pair, [part.shape for part in pair]), strict=True):
                theirs.copy_(mine)
        if "lengths" in self._pairs:
            copied.filled, copied.seen = copied._pairs["lengths"]
        copied.taken = self.taken
        return copied

    def of_layer(self, index: int, keys: torch.Tensor, values: torch.Tensor, slots: int) -> Pair:
        """The slots of layer `index`, (B, H_kv, slots, D), for states like these; what is in it is unspecified."""
        states = keys, values
        return self._pair(index, states, [torch.Size((*part.shape[:2], slots, part.shape[3])) for part in states])

    def start(self, stored: int, seen: int, device: torch.device) -> None:
        """Sets the numbers of tokens, after a prompt."""
        length = torch.empty((), dtype=torch.int64, device=device)
        self.filled, self.seen = self._pair("lengths", (length, length), [length.shape] * 2)
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

    def _pair(self, key: Hashable, like: Pair, shapes: list[torch.Size]) -> Pair:
        held = self._pairs.get(key)
        wanted = [(shape, part.dtype, part.device) for shape, part in zip(shapes, like, strict=True)]
        if held is None or [(part.shape, part.dtype, part.device) for part in held] != wanted:
            held = self._pairs[key] = _new_buffer(*wanted[0]), _new_buffer(*wanted[1])
        return held


def _new_buffer(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A tensor made in inference mode could not be written outside of it, and storage outlives its prompt.
    with torch.inference_mode(False):
        buffer = torch.empty(shape, dtype=dtype, device=device)
    torch._dynamo.mark_static_address(buffer)
    return buffer


def _leave(owner: "weakref.ref[nn.Module]", made: int, pairs: dict[Hashable, Pair]) -> None:
    model = owner()
    if model is not None and (model not in _unused or _unused[model][0] < made):
        _unused[model] = made, pairs
