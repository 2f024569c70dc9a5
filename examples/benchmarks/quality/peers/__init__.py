"""Other published ways to count values or to look ahead, as methods that compare.py holds the library's against.

One method a file, built on the library.  Nothing here is part of its registry: `make_peer` makes a cache of a peer by
its name.  Importing this module imports none of them, nor torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mmshiftkv import Method, PrefillSelectionCache


@dataclass(frozen=True)
class Prompts:
    """What a peer may look at before its cache is made.

    Attributes:
        inputs: the model inputs of the batch, padded on the left.
        tokenizer: the model's.
        attention: `recall.decode_attention` of the full cache's answers to it.
    """

    inputs: Any
    tokenizer: Any
    attention: "Sequence[torch.Tensor]"


def _snapkv_values(model: Any, budget: int, prompts: Prompts | None, **settings: Any) -> "Method":
    from benchmarks.quality.peers.snapkv_values import SnapKVValues

    return SnapKVValues(**settings)


def _last_query_values(model: Any, budget: int, prompts: Prompts | None, **settings: Any) -> "Method":
    from benchmarks.quality.peers.last_query_values import LastQueryValues

    return LastQueryValues(**settings)


def _criticalkv(model: Any, budget: int, prompts: Prompts | None, **settings: Any) -> "Method":
    from benchmarks.quality.peers.criticalkv import CriticalKV

    return CriticalKV(budget=budget, **settings)


def _dropkv(model: Any, budget: int, prompts: Prompts | None, **settings: Any) -> "Method":
    from benchmarks.quality.peers.dropkv import DropKV

    return DropKV(**settings)


def _kvzip(model: Any, budget: int, prompts: Prompts | None, **settings: Any) -> "Method":
    from benchmarks.quality.peers.kvzip import INSTRUCTION, KVzip, repeated_attention

    if prompts is None:
        return KVzip((), **settings)
    instruction = prompts.tokenizer(INSTRUCTION, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return KVzip(repeated_attention(model, prompts.inputs, instruction), **settings)


def _full_attention(model: Any, budget: int, prompts: Prompts | None, **settings: Any) -> "Method":
    from benchmarks.quality.peers.full_attention import FullAttention

    return FullAttention(() if prompts is None else prompts.attention, **settings)


PEERS: dict[str, Callable[..., "Method"]] = {
    "snapkv_values": _snapkv_values,
    "last_query_values": _last_query_values,
    "criticalkv": _criticalkv,
    "dropkv": _dropkv,
    "kvzip": _kvzip,
    "full_attention": _full_attention,
}


def make_peer(
    name: str, model: Any, budget: int, prompts: Prompts | None = None, **settings: Any
) -> "PrefillSelectionCache":
    """A new cache by the name of a peer.

    Args:
        name: one of `PEERS`.
        model: the model that the cache will be used with.
        budget: tokens kept per KV head and layer.
        prompts: the batch that it will get.  Without it "kvzip" and "full_attention" make a cache that refuses every
            prompt which is not kept whole: enough to see whether the settings are allowed.
        settings: fields of the method.

    Raises:
        TypeError, ValueError: a setting or a budget that the method or the cache refuses.
    """
    from mmshiftkv import PrefillSelectionCache

    return PrefillSelectionCache(model, PEERS[name](model, budget, prompts, **settings), budget)
