"""What a cache holds: tokens and bytes, by layer and in all."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .model.parallel import Rank
from .storage.base import SelectedLayer
from .storage.windows import WindowLayer


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache.

    Attributes:
        index: the layer's number.
        selected: whether the layer is one whose prompt tokens are selected.
        tokens_seen: tokens the layer has been given, per row, padding included.
        tokens_stored: tokens it holds, per row and KV head.
        bytes_stored: bytes allocated, slots not yet filled included.
        bytes_full: bytes that the same layer of a DynamicCache would hold.
        bytes_reserved: bytes of slots that are not filled yet: `max_new_tokens` reserves them, growing leaves some.
    """

    index: int
    selected: bool
    tokens_seen: int
    tokens_stored: int
    bytes_stored: int
    bytes_full: int
    bytes_reserved: int = 0


@dataclass(frozen=True)
class CacheReport:
    """All layers of a cache; prints as a table.

    Attributes:
        layers: one report each.
        rank: the process whose part of the cache it is, under tensor parallelism; None: it is the whole cache.
    """

    layers: tuple[LayerReport, ...]
    rank: Rank | None = None

    @property
    def tokens_seen(self) -> int:
        """Tokens seen so far, per row, padding included."""
        return max((layer.tokens_seen for layer in self.layers), default=0)

    @property
    def tokens_stored(self) -> int:
        """Tokens held per row and KV head in each selected layer."""
        return max((layer.tokens_stored for layer in self.layers if layer.selected), default=0)

    @property
    def bytes_stored(self) -> int:
        """Bytes allocated in all layers."""
        return sum(layer.bytes_stored for layer in self.layers)

    @property
    def bytes_full(self) -> int:
        """Bytes that a DynamicCache would hold."""
        return sum(layer.bytes_full for layer in self.layers)

    @property
    def bytes_reserved(self) -> int:
        """Bytes of slots that are not filled yet, in all layers."""
        return sum(layer.bytes_reserved for layer in self.layers)

    @property
    def bytes_saved(self) -> int:
        """bytes_full - bytes_stored; negative where reserved slots outweigh the dropped tokens."""
        return self.bytes_full - self.bytes_stored

    def __str__(self) -> str:
        header = ("layer", "seen", "stored", "bytes", "full cache")
        rows = [
            (f"{layer.index}{'' if layer.selected else ' *'}", *_row(layer.tokens_seen, layer.tokens_stored, layer))
            for layer in self.layers
        ]
        rows.append(("all", *_row(self.tokens_seen, self.tokens_stored, self)))
        lines = aligned([header, *rows])
        if not all(layer.selected for layer in self.layers):
            lines.append("* not compressed")
        if self.bytes_reserved:
            lines.append(f"{format_bytes(self.bytes_reserved)} of these bytes are slots for tokens to come")
        if self.rank is not None:
            lines.append(f"tensor parallel: bytes are those of {self.rank} alone")
        return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]], *, left: bool = False) -> list[str]:
    """A line of text for each row of cells, in columns, aligned on the right or on the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    adjust = str.ljust if left else str.rjust
    return ["  ".join(adjust(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def format_bytes(count: int) -> str:
    """A number of bytes in B, KiB, MiB or GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def report_of(layers: Sequence[Any], rank: Rank | None = None) -> CacheReport:
    """The report of a cache's layers, and whose they are."""
    return CacheReport(tuple(_layer_report(index, layer) for index, layer in enumerate(layers)), rank)


def _layer_report(index: int, layer: Any) -> LayerReport:
    if isinstance(layer, SelectedLayer):
        seen, stored, token = layer.seen, layer.stored, layer.bytes_per_token
        allocated = layer.allocated_bytes
        return LayerReport(index, True, seen, stored, allocated, token * seen, allocated - token * stored)
    if isinstance(layer, WindowLayer) and layer.is_initialized:
        stored, allocated = layer.stored, layer.allocated_bytes
        token = allocated // layer.slots
        return LayerReport(
            index, False, layer.seen, stored, allocated, token * layer.needed, allocated - token * stored
        )
    held = sum(part.nbytes for part in _tensors(vars(layer).values()))
    keys = getattr(layer, "keys", None)
    if keys is None:
        return LayerReport(index, False, 0, 0, held, held)
    return LayerReport(index, False, int(layer.get_seq_length()), keys.shape[-2], held, held)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, torch.Tensor) and value.ndim > 0:
            yield value


def _row(seen: int, stored: int, part: LayerReport | CacheReport) -> tuple[str, ...]:
    return str(seen), str(stored), format_bytes(part.bytes_stored), format_bytes(part.bytes_full)
