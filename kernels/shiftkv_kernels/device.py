"""Where Triton can run, and what a GPU has to offer."""

import functools

import torch


@functools.lru_cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, and the shared memory in bytes that one program may have there.

    Elsewhere, which is where kernels are interpreted, those of a made-up small GPU.
    """
    if device.type != "cuda":
        return 4, 100 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin
