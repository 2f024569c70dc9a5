"""Measure how much further a model's hidden states spread while it decodes than in its prompts, layer by layer.

    python calibrate.py --json calibration.json --plot calibration.png
    python calibrate.py --model Qwen/Qwen2.5-VL-7B-Instruct --image a.png b.png --question "What is due?"

The model answers with the full cache. The table has mean and standard deviation of the input of each attention layer,
over the prompt's tokens and over the decoded ones, and the ratio of the deviations: what `gamma` stands for. Read from
the JSON file, `ShiftKVCache(model, budget=64, gamma=Calibration.load("calibration.json").gamma())` uses them. Without
`--image` the prompts are questions about generated documents, none of which is among those that compare.py asks about.
Without `--model` the small Qwen2.5-VL next to this file answers: its ratios are near 1, but gamma = 10 does better.
"""

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from common import DTYPES, existing_file, output_file, positive_integer
from mmshiftkv import measure_statistics
from tiny_vlm.answering import build_inputs, load
from tiny_vlm.pages import ALL_FONTS, BUILTIN_FONTS, HELD_OUT_SEED, held_out_examples

DEFAULT_MODEL = Path(__file__).resolve().parent / "assets" / "tiny_qwen2_5_vl"
DOCUMENTS_SEED = HELD_OUT_SEED + 1
NEED_MATPLOTLIB = 'needs matplotlib: pip install "mmshiftkv[plot]"'


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, one question for each image; exits with a message when they are wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default=str(DEFAULT_MODEL), help="hub id or local folder (default: the model next to this script)")
    add("--image", type=existing_file, nargs="+", help="image files, a prompt each (default: generated documents)")
    add("--question", nargs="+", help="needed with --image: one for each image, or one for all")
    add(
        "--count", type=positive_integer, default=16, help="generated documents, without --image (default: %(default)s)"
    )
    add("--builtin-font-only", action="store_true", help="draw them without the fonts that come with matplotlib")
    add("--max-new-tokens", type=positive_integer, default=64, help="at least 2 (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="auto", help="default: that of the checkpoint")
    add("--json", type=output_file, help="write the statistics to this file, for Calibration.load")
    add("--plot", type=output_file, help="draw the ratios into this file (.png, .svg or .pdf)")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 2:
        parser.error("--max-new-tokens 1: the first token comes of the prompt, so nothing would be decoded")
    if (arguments.image is None) != (arguments.question is None):
        parser.error("--image and --question need each other")
    if arguments.image is not None:
        if len(arguments.question) == 1:
            arguments.question *= len(arguments.image)
        if len(arguments.question) != len(arguments.image):
            parser.error(f"--question: {len(arguments.question)} for {len(arguments.image)} images; one or as many")
    if importlib.util.find_spec("matplotlib") is None:
        if arguments.plot:
            parser.error(f"--plot {NEED_MATPLOTLIB}")
        if arguments.image is None and not arguments.builtin_font_only:
            parser.error(f"drawing documents without --builtin-font-only {NEED_MATPLOTLIB}")
    return arguments


def images_and_questions(arguments: argparse.Namespace) -> Iterator[tuple[Image.Image, str]]:
    """What is asked, from the arguments."""
    if arguments.image is None:
        fonts = BUILTIN_FONTS if arguments.builtin_font_only else ALL_FONTS
        for example in held_out_examples(arguments.count, DOCUMENTS_SEED, fonts):
            yield example.image, example.question
        return
    for image, question in zip(arguments.image, arguments.question, strict=True):
        yield Image.open(image), question


def prompts(model: Any, processor: Any, arguments: argparse.Namespace) -> Iterator[Any]:
    """Model inputs of one prompt after the other, with a progress bar."""
    total = arguments.count if arguments.image is None else len(arguments.image)
    for image, question in tqdm(images_and_questions(arguments), total=total, unit="prompt"):
        yield build_inputs(processor, [image], [question]).to(model.device, model.dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    model, processor = load(arguments.model, arguments.device, arguments.dtype)
    calibration = measure_statistics(
        model, prompts(model, processor, arguments), max_new_tokens=arguments.max_new_tokens
    )
    print(calibration)
    if arguments.json:
        calibration.save(arguments.json)
    if arguments.plot:
        calibration.draw().savefig(arguments.plot, dpi=150)


if __name__ == "__main__":
    main()
