"""Memory: what is allocated, what a cache holds, and whether an error says that there was too little."""

import gc

import torch
from transformers import Cache

from mmshiftkv import PrefillSelectionCache

# As torch's allocator, CUDA itself and cuBLAS, which makes its workspace when it is first used, say it.
TOO_LITTLE_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


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


def out_of_memory(error: BaseException) -> str | None:
    """What a GPU with too little memory said, in one line; None for any other error.

    Whoever compiles puts errors of the code that it runs into errors of its own.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, RuntimeError) and any(words in text for words in TOO_LITTLE_MEMORY):
            return next(line for line in text.splitlines() if any(words in line for words in TOO_LITTLE_MEMORY))
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    return None
