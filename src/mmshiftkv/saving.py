"""Caches in files: safetensors with JSON in the metadata, and nothing that could run code."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .storage.held import HeldLayer

FORMAT = 1
_NOTES, _DIGEST = "mmshiftkv", "sha256"


@dataclass(frozen=True)
class SavedCache:
    """What a file holds of a cache.

    Attributes:
        kind: the name of the cache's class.
        settings: what the class takes besides the model, ready for JSON.
        fingerprint: of the model, as `fingerprint_of` gives it.
        layers: by number, what each layer holds.
        prompt_ids: (B, T) int64, of the prompt; None where they are not known.
        tensors, notes: what a caller adds: tensors by name, and what is ready for JSON.
    """

    kind: str
    settings: dict[str, Any]
    fingerprint: dict[str, Any]
    layers: dict[int, HeldLayer]
    prompt_ids: torch.Tensor | None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def write(path: str | os.PathLike[str], saved: SavedCache) -> None:
    """Writes a file, or leaves what was there as it was.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {f"added.{name}": part for name, part in saved.tensors.items()}
    if saved.prompt_ids is not None:
        tensors["prompt_ids"] = saved.prompt_ids
    sizes = {}
    for index, held in saved.layers.items():
        tensors |= {f"{index}.keys": held.keys, f"{index}.values": held.values}
        if held.kept is not None:
            tensors[f"{index}.kept"] = held.kept
        sizes[str(index)] = {"seen": held.seen, "prompt_stored": held.prompt_stored, "slots": held.slots}
    tensors = {name: part.detach().cpu().contiguous() for name, part in tensors.items()}
    notes = {
        "format": FORMAT,
        "kind": saved.kind,
        "settings": saved.settings,
        "fingerprint": saved.fingerprint,
        "layers": sizes,
        "added": saved.notes,
    }
    text = json.dumps(notes, sort_keys=True)
    part_of_file = Path(f"{os.fspath(path)}.part")
    try:
        save_file(tensors, part_of_file, metadata={_NOTES: text, _DIGEST: _digest(text, tensors)})
        os.replace(part_of_file, path)
    finally:
        part_of_file.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> SavedCache:
    """What `write` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is none of this package, or was written by a newer one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or no file of mmshiftkv ({error})") from error
    if _NOTES not in metadata:
        raise ValueError(f"{path}: no file of mmshiftkv: its metadata has no {_NOTES!r}")
    text = metadata[_NOTES]
    if metadata.get(_DIGEST) != _digest(text, tensors):
        raise ValueError(f"{path}: damaged: its content does not fit the digest that was written with it")
    notes = json.loads(text)
    if notes["format"] > FORMAT:
        raise ValueError(f"{path}: written by a newer mmshiftkv (format {notes['format']}; this one reads {FORMAT})")
    layers = {
        int(index): HeldLayer(
            tensors.get(f"{index}.kept"), tensors[f"{index}.keys"], tensors[f"{index}.values"], **sizes
        )
        for index, sizes in notes["layers"].items()
    }
    added = {name.removeprefix("added."): part for name, part in tensors.items() if name.startswith("added.")}
    return SavedCache(
        notes["kind"],
        notes["settings"],
        notes["fingerprint"],
        layers,
        tensors.get("prompt_ids"),
        added,
        notes["added"],
    )


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        part = tensors[name]
        digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
        digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
