"""Measure how much further a model's hidden states spread while it decodes than in its prompts, layer by layer.

    python calibrate.py --json calibration.json --plot calibration.png
    python calibrate.py --model Qwen/Qwen2.5-VL-7B-Instruct --image a.png b.png --question "What is due?"

The model answers with the full cache. The table has mean and standard deviation of the input of each attention layer,
over the prompt's tokens and over the decoded ones, and the ratio of the deviations: what `gamma` stands for. Read from
the JSON file, `ShiftKVCache(model, budget=64, gamma=Calibration.load("calibration.json").gamma())` uses them. Without
`--image` the prompts are questions about generated documents, none of which is among those that compare.py asks about.

A measured ratio need not be the best gamma. Those of the small Qwen2.5-VL next to this file, which answers without
`--model`, are near 1. With gamma = 1 it answers 24 percent of its test questions at budget 64, with the default of 10
56 percent; but at budget 32 it answers 17 percent with 1 and 10 percent with 10 (benchmarks/results/variations.md).
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from common import (
    errors_in_one_line,
    image_file,
    model_arguments,
    needs_checkpoint,
    needs_package,
    output_file,
    picture_file,
    positive_integer,
    script_parser,
)

if TYPE_CHECKING:
    from PIL import Image

    from mmshiftkv import Calibration

# Functions import what takes seconds, so that `--help` answers at once.

DOCUMENTS_SEED = 20_240_318  # neither that of the test documents nor that of the ones that settings are chosen with


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, one question for each image; exits with a message when they are wrong."""
    parser = script_parser(__doc__, model_arguments())
    add = parser.add_argument
    add("--image", type=image_file, nargs="+", help="image files, a prompt each (default: generated documents)")
    add("--question", nargs="+", help="needed with --image: one for each image, or one for all")
    add(
        "--count", type=positive_integer, default=16, help="generated documents, without --image (default: %(default)s)"
    )
    add("--builtin-font-only", action="store_true", help="draw them without the fonts that come with matplotlib")
    add("--json", type=output_file, help="write the statistics to this file, for Calibration.load")
    add("--plot", type=picture_file, help="draw the ratios into this file (.png, .svg or .pdf)")
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
    return arguments


def images_and_questions(model: Any, arguments: argparse.Namespace) -> Iterator[tuple["Image.Image", str]]:
    """What is asked, from the arguments; a LLaVA-NeXT is asked about the documents that the small one reads."""
    from PIL import Image

    from tiny_vlm.pages import ALL_FONTS, BUILTIN_FONTS
    from tiny_vlm.question_sets import questions_for

    if arguments.image is None:
        fonts = BUILTIN_FONTS if arguments.builtin_font_only else ALL_FONTS
        for example in questions_for(model).held_out_examples(arguments.count, DOCUMENTS_SEED, fonts):
            yield example.image, example.question
        return
    for image, question in zip(arguments.image, arguments.question, strict=True):
        yield Image.open(image), question


def measure(arguments: argparse.Namespace) -> "Calibration":
    """The statistics of the model on its prompts, with a progress bar."""
    from tqdm import tqdm

    from mmshiftkv import measure_statistics
    from tiny_vlm.answering import build_inputs, load

    model, processor = load(arguments.model, arguments.device, arguments.dtype)
    total = arguments.count if arguments.image is None else len(arguments.image)
    prompts: Iterator[Any] = (
        build_inputs(processor, [image], [question]).to(model.device, model.dtype)
        for image, question in tqdm(images_and_questions(model, arguments), total=total, unit="prompt")
    )
    return measure_statistics(model, prompts, max_new_tokens=arguments.max_new_tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    with errors_in_one_line():
        for package in ("PIL", "torchvision"):
            needs_package(package, "vision")
        if arguments.image is None and not arguments.builtin_font_only:
            needs_package("matplotlib", "plot")
        needs_checkpoint(arguments.model)
        calibration = measure(arguments)
    print(calibration)
    if arguments.json:
        calibration.save(arguments.json)
    if arguments.plot:
        calibration.draw().savefig(arguments.plot, dpi=150)


if __name__ == "__main__":
    main()
