"""From ink cover to the patches that Qwen2.5-VL's vision part reads, on the training device."""

import functools

import torch
from torch import Tensor

from tiny_vlm.build import CELL, IMAGE_MEAN, IMAGE_STD, MERGE, PATCH


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values as a tensor, copied to the device once: a copy per step would make the GPU wait."""
    return torch.tensor(values, device=device)


def paint(batch: dict[str, Tensor]) -> Tensor:
    """Tinted noisy pages as whole numbers 0..255, float (images, 3, height, width)."""
    cover = batch["cover"][:, None].float() / 255
    paper, ink = batch["paper"][..., None, None], batch["ink"][..., None, None]
    pixels = paper * (1 - cover) + ink * cover
    pixels = pixels + batch["noise"][:, None, None, None] * torch.randn_like(pixels)
    return pixels.round().clamp(0, 255)


def patchify(pixels: Tensor) -> Tensor:
    """Normalized patches in the order of the Hugging Face processor, one frame: (images, patches, 3 * 14 * 14)."""
    mean, std = constant(IMAGE_MEAN, pixels.device), constant(IMAGE_STD, pixels.device)
    pixels = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    images, channels, height, width = pixels.shape
    pixels = pixels.reshape(images, channels, height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH)
    return pixels.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(images, -1, channels * PATCH * PATCH)


def two_frames(patches: Tensor) -> Tensor:
    """The processor's `pixel_values`: each patch twice along time, all images in one list."""
    return patches.unflatten(-1, (3, 1, -1)).expand(-1, -1, -1, 2, -1).flatten(2).flatten(0, 1)
