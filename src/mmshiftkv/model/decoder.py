"""Finds the parts of a model that a selecting cache works with."""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .queries import AttentionLayer


class Decoder:
    """The text decoder of a model: its blocks, and the attention layers whose prompt tokens are selected.

    It belongs to the model, not to a cache: a deep copy of it is itself.

    Attributes:
        blocks: decoder blocks, in order.
        attention: AttentionLayer by layer index, for the layers asked for.

    Raises:
        ValueError: the model is an encoder-decoder, or lacks something the method needs; the message names it.
        TypeError: `model` is not a transformers model.
    """

    def __init__(self, model: PreTrainedModel, layer_indices: list[int]) -> None:
        text_model: Any = text_decoder(model)
        self.blocks: tuple[nn.Module, ...] = tuple(text_model.layers)
        rotary = getattr(text_model, "rotary_emb", None)
        if rotary is None:
            raise ValueError(f"model: {type(text_model).__name__} is not supported: it has no attribute 'rotary_emb'")
        config = model.config.get_text_config(decoder=True)
        if "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or {}):
            raise ValueError("model is not supported: its queries are scaled by position (llama_4_scaling_beta)")
        layer_types = getattr(config, "layer_types", None)
        self.attention: dict[int, AttentionLayer] = {}
        for index in layer_indices:
            layer_type = layer_types[index] if layer_types else None
            layer = AttentionLayer(_attention_module(self.blocks[index], index), index, rotary, layer_type)
            layer.check(config.hidden_size)
            self.attention[index] = layer
        self._text_config = config
        self._config = model.config

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
    def is_on_one_device(self) -> bool:
        """Whether all weights of the attention layers lie on one device, none of them offloaded."""
        modules = (layer.module for layer in self.attention.values())
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
    if not hasattr(decoder, "layers") and hasattr(decoder, "model"):
        decoder = decoder.model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"model: {type(decoder).__name__} is not supported: it has no module list 'layers'")
    return decoder


def _attention_module(block: nn.Module, index: int) -> nn.Module:
    for module in block.children():
        if hasattr(module, "q_proj") and hasattr(module, "layer_idx"):
            return module
    raise ValueError(
        f"model: layer {index} ({type(block).__name__}) is not supported: "
        "none of its modules has the attributes 'q_proj' and 'layer_idx'"
    )
