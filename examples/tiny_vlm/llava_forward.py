"""A fast forward pass of LLaVA-NeXT for training: several question-answer segments share one image prefix.

The modules and weights are those of transformers' LlavaNextForConditionalGeneration; only the forward pass is written
anew. `check_against_reference` makes sure that a segment's logits equal those of the unpatched model on the ordinary
prompt with a single question.
"""

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from tiny_vlm.forward import (
    HEAD_DIM,
    TextWeights,
    cos_sin,
    embed,
    linear,
    rms_norm,
    segment_mask,
    split_heads,
    text_layer,
)
from tiny_vlm.llava_batches import PREFIX_HEAD, PREFIX_TAIL, make_batch
from tiny_vlm.llava_build import TOKEN_ID
from tiny_vlm.pixels import constant, paint
from tiny_vlm.tiles import cut, joined, patches_of


class Norm(NamedTuple):
    """Scale and shift of a layer norm."""

    weight: Tensor
    bias: Tensor


class Map(NamedTuple):
    """A linear layer."""

    weight: Tensor
    bias: Tensor


class VisionWeights(NamedTuple):
    """The weights of one layer of the vision tower."""

    norm_before: Norm
    query: Map
    key: Map
    value: Map
    out: Map
    norm_after: Norm
    up: Map
    down: Map


def norm_of(module: Any) -> Norm:
    """The weights of a torch.nn.LayerNorm."""
    return Norm(module.weight, module.bias)


def map_of(module: Any) -> Map:
    """The weights of a torch.nn.Linear."""
    return Map(module.weight, module.bias)


def vision_weights(layer: Any) -> VisionWeights:
    """Takes them from a layer of the vision tower."""
    attention, mlp = layer.self_attn, layer.mlp
    return VisionWeights(
        norm_before=norm_of(layer.layer_norm1),
        query=map_of(attention.q_proj),
        key=map_of(attention.k_proj),
        value=map_of(attention.v_proj),
        out=map_of(attention.out_proj),
        norm_after=norm_of(layer.layer_norm2),
        up=map_of(mlp.fc1),
        down=map_of(mlp.fc2),
    )


def text_weights(layer: Any) -> TextWeights:
    """Takes them from a decoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    return TextWeights(
        norm_before=layer.input_layernorm.weight,
        query=attention.q_proj.weight,
        query_bias=None,
        key=attention.k_proj.weight,
        key_bias=None,
        value=attention.v_proj.weight,
        value_bias=None,
        out=attention.o_proj.weight,
        norm_after=layer.post_attention_layernorm.weight,
        gate=mlp.gate_proj.weight,
        up=mlp.up_proj.weight,
        down=mlp.down_proj.weight,
    )


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """Layer norm over the last dimension, in the dtype of x."""
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), 1e-5)


def vision_layer(x: Tensor, weights: VisionWeights) -> Tensor:
    """All patches of a tile attend to one another; x is (tiles, 1 + patches, width)."""
    y = layer_norm(x, weights.norm_before)
    query, key, value = (split_heads(linear(y, *part)) for part in (weights.query, weights.key, weights.value))
    attended = F.scaled_dot_product_attention(query, key, value)
    x = x + linear(attended.transpose(1, 2).flatten(2), *weights.out)
    y = linear(layer_norm(x, weights.norm_after), *weights.up)
    return x + linear(y * torch.sigmoid(1.702 * y), *weights.down)


@functools.cache
def frequencies(theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies, (HEAD_DIM / 2,)."""
    return (theta ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)).to(device)


class FastForward:
    """The forward pass of `model`, computing in `dtype`; `compiled` puts its layers through torch.compile."""

    def __init__(self, model: LlavaNextForConditionalGeneration, dtype: torch.dtype, compiled: bool) -> None:
        """The weights stay shared with the model."""
        self.config, self.dtype = model.config, dtype
        self.tower, self.language = model.model.vision_tower, model.model.language_model
        self.projector, self.newline = model.model.multi_modal_projector, model.model.image_newline
        self.vision_weights = [vision_weights(layer) for layer in self.tower.encoder.layers]
        self.text_weights = [text_weights(layer) for layer in self.language.layers]
        wrap: Callable[[Any], Any] = functools.partial(torch.compile, dynamic=True) if compiled else lambda same: same
        self.vision_layer, self.text_layer = wrap(vision_layer), wrap(text_layer)

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """Features of the patches: (tiles, patches, width)."""
        embeddings = self.tower.embeddings
        x = linear(patches_of(tiles).to(self.dtype), embeddings.patch_embedding.weight.flatten(1))
        first = embeddings.class_embedding.to(self.dtype).expand(len(x), 1, -1)
        x = torch.cat((first, x), 1) + embeddings.position_embedding.weight.to(self.dtype)
        x = layer_norm(x, norm_of(self.tower.pre_layrnorm))
        for weights in self.vision_weights:
            x = self.vision_layer(x, weights)
        return x[:, 1:]

    def visual_tokens(self, features: Tensor, height: int, width: int) -> Tensor:
        """The downscaled view, then rows of the page with a newline token each: (pages, tokens, text width)."""
        y = F.gelu(linear(features, *map_of(self.projector.linear_1)))
        y = linear(y, *map_of(self.projector.linear_2))  # pages, tiles, patches, width
        rows = joined(y[:, 1:], height, width)
        newline = self.newline.to(y.dtype).expand(*rows.shape[:2], 1, -1)
        return torch.cat((y[:, 0], torch.cat((rows, newline), 2).flatten(1, 2)), 1)

    def rope(self, prefix: int, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the shared prefix followed by segments that all start right after it."""
        before = torch.arange(prefix, device=offsets.device).expand(len(offsets), -1)
        places = torch.cat((before, prefix + offsets), 1)
        theta = self.config.text_config.rope_parameters["rope_theta"]
        cos, sin = cos_sin(places[..., None] * frequencies(theta, offsets.device), self.dtype)
        return cos[:, None], sin[:, None]

    def __call__(self, pixels: Tensor, inputs: Tensor, offsets: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the segment tokens (pages, text, vocabulary), features of the tiles (pages, tiles, patches, width).

        The features are those of the tiles at full size, without the downscaled view.
        """
        tiles = cut(pixels)
        features = self.encode_tiles(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
        table = self.language.embed_tokens.weight.to(self.dtype)
        head = embed(constant(PREFIX_HEAD, inputs.device), table).expand(len(inputs), -1, -1)
        tail = embed(constant(PREFIX_TAIL, inputs.device), table).expand(len(inputs), -1, -1)
        x = torch.cat((head, self.visual_tokens(features, *pixels.shape[-2:]), tail, embed(inputs, table)), 1)
        prefix = x.shape[1] - inputs.shape[1]
        cos, sin = self.rope(prefix, offsets)
        mask = segment_mask(segments, prefix, self.dtype)
        for weights in self.text_weights:
            x = self.text_layer(x, cos, sin, mask, weights)
        x = rms_norm(x[:, prefix:], self.language.norm.weight)
        return linear(x, table), features[:, 1:]


@torch.no_grad()
def check_against_reference(model: LlavaNextForConditionalGeneration, device: torch.device | str) -> float:
    """The largest difference in float32 to the unpatched model's logits on prompts with a single question.

    Raises RuntimeError when it is more than 0.1 % of the largest logit: one position too many makes 0.25 %.
    """
    batch = {name: value.to(device) for name, value in make_batch(random.Random(5), 0.2, shrink=64).items()}
    pixels = paint(batch)
    fast = FastForward(model, torch.float32, compiled=False)
    logits, _ = fast(pixels, batch["inputs"], batch["offsets"], batch["segments"])
    visual = fast.visual_tokens(fast.encode_tiles(cut(pixels)[0])[None], *pixels.shape[-2:]).shape[1]
    head = torch.tensor([*PREFIX_HEAD, *[TOKEN_ID["<image>"]] * visual, *PREFIX_TAIL], device=device)
    worst = scale = 0.0
    for image in range(len(pixels)):
        for number in range(2):
            here = batch["segments"][image] == number
            ids = torch.cat((head, batch["inputs"][image, here]))[None]
            reference = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=cut(pixels[image : image + 1]),
                image_sizes=torch.tensor([pixels.shape[-2:]], device=device),
            ).logits[0, len(head) :]
            worst = max(worst, (reference - logits[image, here]).abs().max().item())
            scale = max(scale, reference.abs().max().item())
    if not worst < 0.001 * scale:
        raise RuntimeError(f"the fast forward pass differs by {worst} from logits of up to {scale}")
    return worst
