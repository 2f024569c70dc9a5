"""From pages to the tiles that LLaVA-NeXT's vision tower reads, on the training device."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_vlm.build import IMAGE_MEAN, IMAGE_STD, PATCH
from tiny_vlm.llava_build import PATCHES, TILE
from tiny_vlm.pixels import constant


@functools.cache
def shrinking(length: int, device: torch.device) -> Tensor:
    """The matrix (TILE, length) that resizes one axis as the processor does, bicubic without aliasing."""
    identity = torch.eye(length)[None, None]
    return F.interpolate(identity, size=(TILE, length), mode="bicubic", antialias=True)[0, 0].to(device)


def downscaled(pages: Tensor) -> Tensor:
    """The whole pages in one tile, as whole numbers 0..255; pages and tiles are (pages, 3, height, width).

    As in the processor the width comes first, and what lies between the two is rounded and clamped too.
    """
    height, width = pages.shape[-2:]
    narrow = (pages @ shrinking(width, pages.device).T).round().clamp(0, 255)
    return (shrinking(height, pages.device) @ narrow).round().clamp(0, 255)


def cut(pages: Tensor) -> Tensor:
    """The processor's `pixel_values`: the downscaled page, then its tiles by rows, (pages, tiles, 3, TILE, TILE)."""
    tiles = pages.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))  # pages, 3, rows, TILE, columns, TILE
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    tiles = torch.cat((downscaled(pages)[:, None], tiles), 1)
    mean, std = constant(IMAGE_MEAN, pages.device), constant(IMAGE_STD, pages.device)
    return (tiles / 255 - mean[:, None, None]) / std[:, None, None]


def patches_of(tiles: Tensor) -> Tensor:
    """The pixels of each patch, in the order of the convolution's kernel: (tiles, patches, 3 * 14 * 14)."""
    count, channels = tiles.shape[:2]
    grid = tiles.reshape(count, channels, PATCHES, PATCH, PATCHES, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(count, PATCHES**2, -1)


def joined(features: Tensor, height: int, width: int) -> Tensor:
    """Features of the tiles, (pages, tiles, patches, width), as rows of the page: (pages, rows, columns, width)."""
    grid = features.reshape(len(features), height // TILE, width // TILE, PATCHES, PATCHES, -1)
    return grid.transpose(2, 3).reshape(len(features), height // PATCH, width // PATCH, -1)
