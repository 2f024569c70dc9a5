"""Memory: what is allocated, and what a cache holds."""

import gc

import torch
from transformers import Cache

from mmshiftkv import PrefillSelectionCache


def allocated(device: torch.device) -> int:
    """Bytes of the tensors on a GPU; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free_unused(device: torch.device) -> None:
    """Gives memory that no tensor uses back to the GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def held_bytes(cache: Cache) -> int:
    """What a cache holds, in bytes, slots not yet filled included."""
    if isinstance(cache, PrefillSelectionCache):
        return cache.report().bytes_stored
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
