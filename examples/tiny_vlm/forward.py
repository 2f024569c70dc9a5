"""A fast forward pass of Qwen2.5-VL for training: several question-answer segments share one image prefix.

The modules and weights are those of transformers' Qwen2_5_VLForConditionalGeneration; only the forward pass is written
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
from transformers import Qwen2_5_VLForConditionalGeneration

from tiny_vlm.batches import IMAGE, PREFIX_HEAD, VISION_END, make_batch
from tiny_vlm.build import CELL, MERGE, PATCH
from tiny_vlm.pixels import constant, paint, patchify, two_frames

HEAD_DIM = 32  # of both parts; a module constant, so that torch.compile does not make it symbolic


class VisionWeights(NamedTuple):
    """The weights of one vision block."""

    norm_before: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    norm_after: Tensor
    gate: Tensor
    gate_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


class TextWeights(NamedTuple):
    """The weights of one decoder layer."""

    norm_before: Tensor
    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    out: Tensor
    norm_after: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def vision_weights(block: Any) -> VisionWeights:
    """Takes them from a block of the vision part."""
    attention, mlp = block.attn, block.mlp
    return VisionWeights(
        norm_before=block.norm1.weight,
        qkv=attention.qkv.weight,
        qkv_bias=attention.qkv.bias,
        out=attention.proj.weight,
        out_bias=attention.proj.bias,
        norm_after=block.norm2.weight,
        gate=mlp.gate_proj.weight,
        gate_bias=mlp.gate_proj.bias,
        up=mlp.up_proj.weight,
        up_bias=mlp.up_proj.bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )


def text_weights(layer: Any) -> TextWeights:
    """Takes them from a decoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    return TextWeights(
        norm_before=layer.input_layernorm.weight,
        query=attention.q_proj.weight,
        query_bias=attention.q_proj.bias,
        key=attention.k_proj.weight,
        key_bias=attention.k_proj.bias,
        value=attention.v_proj.weight,
        value_bias=attention.v_proj.bias,
        out=attention.o_proj.weight,
        norm_after=layer.post_attention_layernorm.weight,
        gate=mlp.gate_proj.weight,
        up=mlp.up_proj.weight,
        down=mlp.down_proj.weight,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root mean square norm over the last dimension, computed in float32."""
    wide = x.float()
    return weight.to(x.dtype) * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; x is (batch, heads, length, dim), cos and sin broadcast to it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """Embedding as a matrix product: unlike a lookup, its backward pass never waits for the GPU."""
    return (tokens[..., None] == torch.arange(len(table), device=tokens.device)).to(table.dtype) @ table


def split_heads(x: Tensor) -> Tensor:
    """(batch, length, heads * HEAD_DIM) -> (batch, heads, length, HEAD_DIM)."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def vision_block(x: Tensor, cos: Tensor, sin: Tensor, weights: VisionWeights) -> Tensor:
    """All patches of an image attend to one another; x is (images, patches, width)."""
    joined = linear(rms_norm(x, weights.norm_before), weights.qkv, weights.qkv_bias)
    query, key, value = (split_heads(part) for part in joined.chunk(3, -1))
    attended = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
    x = x + linear(attended.transpose(1, 2).flatten(2), weights.out, weights.out_bias)
    y = rms_norm(x, weights.norm_after)
    gated = F.silu(linear(y, weights.gate, weights.gate_bias)) * linear(y, weights.up, weights.up_bias)
    return x + linear(gated, weights.down, weights.down_bias)


def text_layer(x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, weights: TextWeights) -> Tensor:
    """Prefix positions attend causally to the prefix; segment positions attend as `mask` says.

    x is (images, prefix + text, width), the additive mask (images, 1, text, prefix + text).
    """
    text = mask.shape[2]
    prefix = x.shape[1] - text
    y = rms_norm(x, weights.norm_before)
    query = rotate(split_heads(linear(y, weights.query, weights.query_bias)), cos, sin)
    key = rotate(split_heads(linear(y, weights.key, weights.key_bias)), cos, sin)
    value = split_heads(linear(y, weights.value, weights.value_bias))
    heads = query.shape[1]
    key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
    before = F.scaled_dot_product_attention(
        query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True
    )
    mask = mask.expand(-1, heads, -1, -1)
    after = F.scaled_dot_product_attention(query[:, :, prefix:], key, value, attn_mask=mask)
    x = x + linear(torch.cat((before, after), 2).transpose(1, 2).flatten(2), weights.out)
    y = rms_norm(x, weights.norm_after)
    return x + linear(F.silu(linear(y, weights.gate)) * linear(y, weights.up), weights.down)


def cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (..., HEAD_DIM), of angles (..., HEAD_DIM / 2)."""
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def segment_mask(segments: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (images, 1, text, prefix + text): each segment sees the prefix and its own past."""
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
    allowed = torch.cat((same.new_ones(*segments.shape, prefix), same & causal), -1)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=same.device).masked_fill(~allowed, -torch.inf)


def grid_positions(rows: int, columns: int) -> Tensor:
    """Row and column of every cell, (2, rows, columns)."""
    return torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))


@functools.cache
def vision_angles(height: int, width: int, device: torch.device) -> Tensor:
    """Axial rotary angles of the patches, in the processor's order: (patches, HEAD_DIM / 2)."""
    rows, columns, half = height // PATCH, width // PATCH, HEAD_DIM // 2
    place = grid_positions(rows, columns).reshape(2, rows // MERGE, MERGE, columns // MERGE, MERGE)
    frequency = 10000.0 ** -(torch.arange(0, half, 2).float() / half)
    return torch.cat([axis[:, None] * frequency for axis in place.transpose(2, 3).reshape(2, -1)], -1).to(device)


@functools.cache
def text_angles(
    height: int, width: int, theta: float, mrope_section: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Rotary angles of the prefix, (prefix, HEAD_DIM / 2), the frequencies, and the position right after the prefix."""
    rows, columns, before = height // CELL, width // CELL, len(PREFIX_HEAD)
    grid = grid_positions(rows, columns).flatten(1)
    after = before + max(rows, columns)
    head = torch.arange(before).expand(3, -1)
    image = before + torch.cat((torch.zeros_like(grid[:1]), grid))
    positions = torch.cat((head, image, torch.full((3, 1), after)), 1)
    frequency = theta ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    section = torch.repeat_interleave(torch.arange(3), torch.tensor(mrope_section))
    return (positions.T[:, section] * frequency).to(device), frequency.to(device), after + 1


class FastForward:
    """The forward pass of `model`, computing in `dtype`; `compiled` puts its layers through torch.compile."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, dtype: torch.dtype, compiled: bool) -> None:
        """The weights stay shared with the model."""
        self.config, self.dtype = model.config, dtype
        self.visual, self.language = model.model.visual, model.model.language_model
        self.vision_weights = [vision_weights(block) for block in self.visual.blocks]
        self.text_weights = [text_weights(layer) for layer in self.language.layers]
        wrap: Callable[[Any], Any] = functools.partial(torch.compile, dynamic=True) if compiled else lambda same: same
        self.vision_block, self.text_layer = wrap(vision_block), wrap(text_layer)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features before merging, and visual tokens."""
        kernel = self.visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames are the same image
        x = linear(patchify(pixels).to(self.dtype), kernel)
        cos, sin = cos_sin(vision_angles(*pixels.shape[-2:], x.device), x.dtype)
        for weights in self.vision_weights:
            x = self.vision_block(x, cos, sin, weights)
        merger = self.visual.merger
        merged = rms_norm(x, merger.ln_q.weight).reshape(len(x), -1, x.shape[-1] * MERGE**2)
        merged = F.gelu(linear(merged, merger.mlp[0].weight, merger.mlp[0].bias))
        return x, linear(merged, merger.mlp[2].weight, merger.mlp[2].bias)

    def rope(self, height: int, width: int, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """M-RoPE of the shared prefix followed by segments that all start right after it."""
        parameters = self.config.text_config.rope_parameters
        prefix, frequency, start = text_angles(
            height, width, parameters["rope_theta"], tuple(parameters["mrope_section"]), offsets.device
        )
        text = (start + offsets)[..., None] * frequency
        cos, sin = cos_sin(torch.cat((prefix.expand(len(offsets), -1, -1), text), 1), self.dtype)
        return cos[:, None], sin[:, None]

    def __call__(self, pixels: Tensor, inputs: Tensor, offsets: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the segment tokens (images, text, vocabulary) and patch features (images, patches, width)."""
        features, visual_tokens = self.encode_images(pixels)
        table = self.language.embed_tokens.weight.to(self.dtype)
        head = embed(constant(PREFIX_HEAD, inputs.device), table).expand(len(inputs), -1, -1)
        tail = embed(F.pad(inputs, (1, 0), value=VISION_END), table)
        x = torch.cat((head, visual_tokens, tail), 1)
        height, width = pixels.shape[-2:]
        cos, sin = self.rope(height, width, offsets)
        mask = segment_mask(segments, x.shape[1] - inputs.shape[1], self.dtype)
        for weights in self.text_weights:
            x = self.text_layer(x, cos, sin, mask, weights)
        x = rms_norm(x[:, -inputs.shape[1] :], self.language.norm.weight)
        return linear(x, table), features


@torch.no_grad()
def check_against_reference(model: Qwen2_5_VLForConditionalGeneration, device: torch.device | str) -> float:
    """The largest difference in float32 to the unpatched model's logits on prompts with a single question.

    Raises RuntimeError when it is more than 0.5 % of the largest logit.
    """
    batch = {name: value.to(device) for name, value in make_batch(random.Random(5), 0.1, shrink=64).items()}
    pixels = paint(batch)
    fast = FastForward(model, torch.float32, compiled=False)
    logits, _ = fast(pixels, batch["inputs"], batch["offsets"], batch["segments"])
    rows, columns = pixels.shape[-2] // CELL, pixels.shape[-1] // CELL
    grid = torch.tensor([[1, rows * MERGE, columns * MERGE]], device=device)
    head = torch.tensor([*PREFIX_HEAD, *[IMAGE] * (rows * columns), VISION_END], device=device)
    worst = scale = 0.0
    for image in range(len(pixels)):
        for number in range(2):
            here = batch["segments"][image] == number
            ids = torch.cat((head, batch["inputs"][image, here]))[None]
            reference = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=two_frames(patchify(pixels[image : image + 1])),
                image_grid_thw=grid,
                mm_token_type_ids=(ids == IMAGE).int(),
            ).logits[0, len(head) :]
            worst = max(worst, (reference - logits[image, here]).abs().max().item())
            scale = max(scale, reference.abs().max().item())
    if not worst < 0.005 * scale:
        raise RuntimeError(f"the fast forward pass differs by {worst} from logits of up to {scale}")
    return worst
