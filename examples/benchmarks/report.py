"""What all benchmarks share of their output: one kind of table, one record of the environment, JSON files."""

import argparse
import importlib.util
import json
import platform
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import existing_file

if TYPE_CHECKING:
    import torch


def table(
    header: Sequence[str],
    *blocks: Iterable[Sequence[str]],
    left: Collection[str] = (),
    markdown: bool = False,
) -> str:
    """Lines of aligned cells under a header.

    Args:
        header: the names of the columns.
        blocks: rows of cells; there is an empty line between two blocks.
        left: columns whose cells start at the same place; those of the others end at the same place.
        markdown: a table of Markdown instead of plain text; it has no empty lines.
    """
    from tabulate import SEPARATING_LINE, tabulate

    rows: list[Any] = []
    for block in blocks:
        rows += [SEPARATING_LINE, *block] if rows and not markdown else block
    aligned = ["left" if name in left else "right" for name in header]
    if markdown:
        return tabulate(rows, header, tablefmt="github", colalign=aligned, disable_numparse=True)
    # As a row among others: tabulate makes columns wider than what is in them for the sake of a header.
    return tabulate([header, *rows], tablefmt="plain", colalign=aligned, disable_numparse=True)


def device_name(device: "torch.device") -> str:
    """What the device is called, as far as its maker says."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, threads: {torch.get_num_threads()})"


def environment(device: "torch.device") -> dict[str, str | None]:
    """What figures were measured on and with; there is no triton on some platforms."""
    import torch
    import transformers

    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes what was measured as JSON."""
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(text: str, script: str, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """For an argparse type: what `write_record` wrote, by the path of the file.

    Args:
        text: the path.
        script: the name of the script that wrote it, for messages.
        check: fails on what is no record of this script.

    Raises:
        argparse.ArgumentTypeError: there is no such file, or it holds something else.
    """
    path = Path(existing_file(text))
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check(record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON file of {script}: {error!r}") from error
    return record
