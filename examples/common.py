"""What the scripts share: arguments that are checked before anything slow is imported, and errors in one line."""

import argparse
import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).resolve().parent / "assets"
TINY_MODEL = ASSETS / "tiny_qwen2_5_vl"
DTYPES = ("auto", "bfloat16", "float16", "float32")
# `mmshiftkv.METHODS`, written down once more: importing it takes seconds, which `--help` must not.
METHODS = ("full", "shiftkv", "random", "streaming_llm", "expected_attention", "snapkv", "keydiff")


def script_parser(documentation: str | None, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser whose `--help` shows all of a script's docstring, examples included."""
    return argparse.ArgumentParser(
        description=documentation, parents=list(parents), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def budget(text: str) -> int | float:
    """An argparse type: a whole number of tokens, at least 1, or a fraction of the prompt in (0, 1], such as 0.1."""
    with contextlib.suppress(ValueError):
        if (tokens := int(text)) >= 1:
            return tokens
    with contextlib.suppress(ValueError):
        if 0 < (fraction := float(text)) <= 1:
            return fraction
    raise argparse.ArgumentTypeError(
        f"a budget is a whole number of tokens, at least 1, or a fraction of the prompt in (0, 1], got {text!r}"
    )


def positive_integer(text: str) -> int:
    """An argparse type: a whole number, at least 1."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"needs a whole number, at least 1, got {text!r}")


def existing_file(text: str) -> str:
    """An argparse type: the path of a file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text!r}")
    return text


def existing_folder(text: str) -> Path:
    """An argparse type: the path of a folder that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {text!r}")
    return Path(text)


def output_file(text: str) -> Path:
    """An argparse type: the path of a file to write, in a folder that exists."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {str(path.parent)!r}")
    return path


def picture_file(text: str) -> Path:
    """An argparse type: as `output_file`, of a format that matplotlib can write, such as .png, .svg or .pdf."""
    path = output_file(text)
    needs_package("matplotlib", "plot")
    from matplotlib.figure import Figure

    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise argparse.ArgumentTypeError(
            f"{path.name!r} has no ending that matplotlib can draw: {', '.join(f'.{name}' for name in formats)}"
        )
    return path


def choose_device(text: str) -> "torch.device":
    """An argparse type: a torch device that is there; "auto" is the GPU if there is one, else the CPU."""
    import torch

    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from error
    return device


def needs_package(name: str, extra: str) -> None:
    """Raises argparse.ArgumentTypeError, with the command that helps, unless a package is installed."""
    if importlib.util.find_spec(name) is None:
        raise argparse.ArgumentTypeError(f'needs {name}: pip install "mmshiftkv[{extra}]"')


def fail(error: object) -> NoReturn:
    """Ends the script with status 1 and one line on what is wrong."""
    raise SystemExit(f"error: {' '.join(str(error).split())}")


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Around what a user may have got wrong: a checkpoint, a setting, a model that is not supported."""
    try:
        yield
    except (OSError, ImportError, TypeError, ValueError) as error:
        fail(error)


def family_arguments(default_model: str) -> argparse.ArgumentParser:
    """What a script for one model family takes besides images, to be used as a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default=default_model, help="hub id or local folder (default: %(default)s)")
    parser.add_argument("--question", default="What does it show?", help="default: %(default)s")
    parser.add_argument(
        "--budget",
        type=budget,
        default=64,
        help="prompt tokens to keep per layer and head, or the fraction of them in (0, 1] (default: %(default)s)",
    )
    parser.add_argument("--max-new-tokens", type=positive_integer, default=256, help="default: %(default)s")
    parser.add_argument("--attn", default="sdpa", help="attention implementation (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: that of the checkpoint")
    parser.add_argument("--device-map", default="auto", help="where the weights go (default: %(default)s)")
    return parser
