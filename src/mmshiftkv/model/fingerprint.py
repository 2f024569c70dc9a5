"""What tells one model from another, as far as the keys and values of a cache depend on it."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from .decoder import Decoder
from .offload import stored_weight
from .parallel import local_part

_SAMPLES = 64  # of each parameter
_NAMES = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters")


def fingerprint_of(decoder: Decoder) -> dict[str, Any]:
    """The settings of a model that its keys and values depend on, and a digest of some weights, ready for JSON.

    The digest takes a few numbers of each parameter in the first, the middle and the last block: enough to tell two
    checkpoints apart, and cheap.  Offloaded weights are read from where accelerate keeps them; of those that several
    processes share, the digest takes this one's part.
    """
    blocks, config = decoder.blocks, decoder.text_config
    sampled = [blocks[place] for place in sorted({0, len(blocks) // 2, len(blocks) - 1})]
    fingerprint = {
        **{name: getattr(config, name, None) for name in _NAMES},
        "layers": len(blocks),
        "rank": None if decoder.rank is None else str(decoder.rank),
        "dtype": str(next(blocks[0].parameters()).dtype).removeprefix("torch."),
        "weights": _digest(sampled),
    }
    # As it comes back from a file: tuples are lists there.
    return json.loads(json.dumps(fingerprint, default=str))


def check_fingerprint(saved: dict[str, Any], decoder: Decoder, path: Any) -> None:
    """Raises ValueError, which names what differs, unless the model is the one of `saved`."""
    mine = fingerprint_of(decoder)
    for name in dict.fromkeys([*mine, *saved]):
        if saved.get(name) != mine.get(name):
            if name == "rank":
                there, here = saved.get(name) or "one process", mine[name] or "one process"
                raise ValueError(f"{path}: saved by {there}, and this is {here}: give each rank the file that it saved")
            what = f"{name} is {saved.get(name)!r} there and {mine.get(name)!r} here"
            raise ValueError(f"{path}: saved with another model: {'its weights differ' if name == 'weights' else what}")


def _digest(blocks: list[nn.Module]) -> str:
    samples = []
    for block in blocks:
        for name, _ in block.named_parameters():
            weight = local_part(stored_weight(block, name).detach())
            if weight.device.type != "meta":
                flat = weight.reshape(-1)
                samples.append(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float().cpu())
    return hashlib.sha256(torch.cat(samples).numpy().tobytes() if samples else b"").hexdigest()
