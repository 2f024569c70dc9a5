"""What the scripts share: arguments that are checked before anything slow is imported, and errors in one line."""

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).resolve().parent / "assets"
TINY_MODEL = ASSETS / "tiny_qwen2_5_vl"
TINY_LLAVA = ASSETS / "tiny_llava_next"
NAMED_MODELS = {"qwen": TINY_MODEL, "llava": TINY_LLAVA}
DTYPES = ("auto", "bfloat16", "float16", "float32")
# The methods by the names that people read. The keys are `mmshiftkv.METHODS`, written down once more because importing
# them takes seconds, which `--help` must not.
METHOD_NAMES = {
    "full": "full cache",
    "shiftkv": "ShiftKV",
    "random": "Random",
    "streaming_llm": "StreamingLLM",
    "expected_attention": "ExpectedAttention",
    "snapkv": "SnapKV",
    "keydiff": "KeyDiff",
}
METHODS = tuple(METHOD_NAMES)
LONGEST_ERROR = 400  # characters; of a longer message only the first line is shown


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


def image_file(text: str) -> str:
    """An argparse type: the path of a file that Pillow reads as an image."""
    needs_package("PIL", "vision")
    from PIL import Image

    try:
        with Image.open(existing_file(text)) as image:
            image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise argparse.ArgumentTypeError(f"not an image that can be read: {text!r}") from error
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
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise argparse.ArgumentTypeError(f'cannot use {text!r} ({reason}); "cpu" always works') from error
    return device


def device_map(text: str) -> str:
    """An argparse type: where transformers puts a model's weights, a device that is there or a way to spread them."""
    if text not in ("auto", "balanced", "balanced_low_0", "sequential"):
        choose_device(text)
    return text


def needs_package(name: str, extra: str) -> None:
    """Raises argparse.ArgumentTypeError, with the command that helps, unless a package is installed."""
    if importlib.util.find_spec(name) is None:
        raise argparse.ArgumentTypeError(f'needs {name}: pip install "mmshiftkv[{extra}]"')


def needs_checkpoint(name: str) -> None:
    """Raises argparse.ArgumentTypeError unless there is a checkpoint to load: a folder, or a model on the hub.

    Without network transformers asks the hub for one file after the other, for minutes, before it says so.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise argparse.ArgumentTypeError(f"no checkpoint in the folder {name!r}: it has no config.json")
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if try_to_load_from_cache(name, "config.json") is None:
            HfApi().model_info(name, timeout=10)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f"no such folder: {name!r}") from error
    except RepositoryNotFoundError as error:
        raise argparse.ArgumentTypeError(
            f"{name!r} is neither a folder nor a model on the Hugging Face hub; a private one needs `hf auth login`"
        ) from error
    except Exception as error:  # a failed connection is an error of whatever network library the hub's client uses
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"{name!r} is not a folder, and the Hugging Face hub cannot be asked for it ({reason}): "
            "give a local folder, or check the network"
        ) from error


def fail(error: object) -> NoReturn:
    """Ends the script with status 1 and one line on what is wrong."""
    text = str(error).strip()
    if len(text) > LONGEST_ERROR:
        text = text.splitlines()[0]
    raise SystemExit(f"error: {' '.join(text.split())}")


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Around what a user may have got wrong: a package, a checkpoint, a setting, a model that is not supported."""
    try:
        yield
    except (argparse.ArgumentTypeError, OSError, ImportError, TypeError, ValueError) as error:
        fail(error)


def sample_documents(model: str = str(TINY_MODEL)) -> dict[str, list[dict[str, str]]]:
    """The names of the image files in `ASSETS` for a model; of each, its questions and answers.

    The small LLaVA-NeXT has its own; those of the small Qwen2.5-VL are for all others too.
    """
    name = "documents_llava.json" if model == str(TINY_LLAVA) else "documents.json"
    documents: dict[str, list[dict[str, str]]] = json.loads((ASSETS / name).read_text(encoding="utf-8"))
    return documents


def all_sample_documents() -> dict[str, list[dict[str, str]]]:
    """The sample documents of both small models."""
    return {name: asked for folder in NAMED_MODELS.values() for name, asked in sample_documents(str(folder)).items()}


def named_model(text: str) -> str:
    """An argparse type: one of `NAMED_MODELS` by its name, or a hub id or local folder as it is."""
    return str(NAMED_MODELS.get(text, text))


def fill_in_sample(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Sets image and question to those of the model's first sample document where none are given.

    An image without a question is an error of the parser.
    """
    if arguments.image is None:
        name, questions = next(iter(sample_documents(arguments.model).items()))
        arguments.image = str(ASSETS / name)
        arguments.question = arguments.question or questions[0]["question"]
    elif arguments.question is None:
        parser.error("--image needs a --question")


def true_answer(image: str, question: str) -> str | None:
    """The answer to a question about a sample document; None for what is not in the samples."""
    path = Path(image).resolve()
    if path.parent != ASSETS:
        return None
    answers = (
        sample["answer"] for sample in all_sample_documents().get(path.name, []) if sample["question"] == question
    )
    return next(answers, None)


def model_arguments() -> argparse.ArgumentParser:
    """What a script takes that runs the small model, or another one, on one device; to be used as a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add(
        "--model",
        type=named_model,
        default=str(TINY_MODEL),
        help='hub id or local folder; "qwen" and "llava" are the small models next to this script (default: qwen)',
    )
    add("--max-new-tokens", type=positive_integer, default=64, help="of the answer (default: %(default)s)")
    add("--device", type=choose_device, default="auto", help='such as "cpu" (default: the GPU if there is one)')
    add("--dtype", choices=DTYPES, default="auto", help="default: that of the checkpoint")
    return parser


def family_arguments(default_model: str) -> argparse.ArgumentParser:
    """What a script for one model family takes besides images, to be used as a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--model",
        type=named_model,
        default=default_model,
        help='hub id or local folder; "qwen" and "llava" are the small models next to this script'
        " (default: %(default)s)",
    )
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
    parser.add_argument(
        "--device-map", type=device_map, default="auto", help="where the weights go (default: %(default)s)"
    )
    return parser
