"""Finds the parts of a model that a selecting cache works with."""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from shiftkv_kernels.replaying import Replays

from .asking import CACHES, parameters_of, takes_query_by_function
from .parallel import SharedHeads, rank_of
from .queries import AttentionLayer
from .rotary import Rotary, rotary_of

# By text model.  What a model's parts are is looked up for the first of its caches only.
_known: "weakref.WeakKeyDictionary[nn.Module, Decoder]" = weakref.WeakKeyDictionary()


class Decoder:
    """The text decoder of a model: its blocks, and the attention layers whose prompt tokens are selected.

    It belongs to the model, not to a cache: a deep copy of it is itself.

    Attributes:
        blocks: decoder blocks, in order.
        attention: AttentionLayer by layer index, for the layers asked for.
        rank: which of the processes that share the model this is; None: there is but one.
        replays: what was done for a layer of a prompt, to be repeated for other layers and prompts.

    Raises:
        ValueError: the model is an encoder-decoder, or lacks something the method needs; the message names it.
        TypeError: `model` is not a transformers model.
    """

    def __init__(self, model: PreTrainedModel, layer_indices: list[int]) -> None:
        text_model: Any = text_decoder(model)
        self._children = tuple(text_model.children())
        self.blocks: tuple[nn.Module, ...] = tuple(_blocks(text_model))
        config = model.config.get_text_config(decoder=True)
        layer_types = getattr(config, "layer_types", None)
        last_position = (getattr(config, "max_position_embeddings", None) or 1) - 1
        self.rank = rank_of(model)
        self.replays = Replays()
        heads = SharedHeads.of(config, self.rank)
        self.attention: dict[int, AttentionLayer] = {}
        self._places: dict[int, list[str]] = {}
        try:
            for index in layer_indices:
                name, module = _attention_module(self.blocks[index], index)
                self._places[index] = name.split(".")
                self.attention[index] = AttentionLayer(
                    module,
                    index,
                    Rotary(rotary_of(text_model, config, index), layer_types[index] if layer_types else None),
                    config.hidden_size,
                    last_position,
                    heads,
                )
        except ValueError as error:
            # Heads that were cut in pieces fail in many ways, none of which says so.
            if heads.obstacle:
                raise ValueError(f"model: {type(model).__name__} is not supported: {heads.obstacle}") from error
            raise
        self._text_config = config
        self._config = model.config

    @classmethod
    def of(cls, model: PreTrainedModel, layer_indices: list[int], text_model: nn.Module | None = None) -> "Decoder":
        """The decoder of a model: the one that was found before, as long as the model has the same parts.

        Args:
            model, layer_indices: as of the class.
            text_model: what `text_decoder` gives, if it is known.
        """
        text_model = text_decoder(model) if text_model is None else text_model
        known = _known.get(text_model)
        if known is None or not known._is_still(text_model, model.config, layer_indices):
            known = _known[text_model] = cls(model, layer_indices)
        return known

    def _is_still(self, text_model: nn.Module, config: Any, layer_indices: list[int]) -> bool:
        return (
            list(self.attention) == layer_indices
            and self._config is config
            and self._children == tuple(text_model.children())
            and self.blocks == tuple(_blocks(text_model))
            and all(
                _module_at(self.blocks[index], place) is self.attention[index].module
                for index, place in self._places.items()
            )
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Decoder":
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a selecting cache holds on to its model and cannot be pickled; copy.deepcopy copies it")

    @property
    def text_config(self) -> Any:
        """The config of the text model."""
        return self._text_config

    @property
    def attention_implementation(self) -> str:
        """The name of the function that computes attention, such as "sdpa"."""
        return self._text_config._attn_implementation

    @property
    def has_chunks(self) -> bool:
        """Whether layers attend to chunks of tokens."""
        return getattr(self._text_config, "attention_chunk_size", None) is not None

    @property
    def is_on_one_device(self) -> bool:
        """Whether all weights of the attention layers, and of blocks without one, lie on one device, none offloaded."""
        layers = self.attention
        modules = (layers[index].module if index in layers else block for index, block in enumerate(self.blocks))
        devices = {parameter.device for module in modules for parameter in module.parameters()}
        return len(devices) == 1 and torch.device("meta") not in devices

    def fresh_layers(self) -> list[Any]:
        """Empty cache layers, of the kinds that the model's layers call for."""
        return DynamicCache(config=self._config).layers


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The module of `model` that holds the decoder blocks as `layers`.

    Raises:
        TypeError, ValueError: as `Decoder` says.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"model must be a transformers model, not {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: {type(model).__name__} is an encoder-decoder; only decoders are supported")
    find: Any = getattr(model, "get_decoder", None)
    decoder: Any = find() if find else model
    # Some wrap the module with the blocks once more, or call their head "decoder".
    for inner in (getattr(decoder, "model", None), getattr(model, "model", None)):
        if _blocks(decoder) is None and isinstance(inner, nn.Module):
            decoder = inner
    if _blocks(decoder) is None:
        raise ValueError(f"model: {type(decoder).__name__} is not supported: it has no list of decoder blocks")
    return decoder


def _blocks(decoder: nn.Module) -> Any:
    for name in ("layers", "h", "blocks"):
        blocks = getattr(decoder, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return blocks
    return None


def _module_at(module: nn.Module | None, place: list[str]) -> nn.Module | None:
    """The module in another, a name at a time; every cache that is built looks for those of all layers."""
    for name in place:
        module = None if module is None else module._modules.get(name)
    return module


def _attention_module(block: nn.Module, index: int) -> tuple[str, nn.Module]:
    """The module of a block that attends to the tokens before, and its name in the block."""
    inside = [(name, module) for name, module in block.named_modules() if name and hasattr(module, "layer_idx")]
    found = [each for each in inside if any(name in CACHES for name in parameters_of(each[1]))]
    asked = [each for each in found if takes_query_by_function(each[1])]
    rebuilt = [each for each in found if hasattr(each[1], "q_proj")]
    for candidates in (asked, rebuilt):
        if len(candidates) == 1:
            return candidates[0]
    if len(found) == 1:
        return found[0]
    names = ", ".join(type(module).__name__ for _, module in found)
    what = f"several of its modules attend to tokens ({names})" if found else "none of its modules attends to tokens"
    raise ValueError(f"model: layer {index} ({type(block).__name__}) is not supported: {what}")
