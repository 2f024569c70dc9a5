"""Draw which parts of an image, and which words of the question, stay in a compressed KV cache.

    python visualize.py --output heatmap.png
    python visualize.py --methods value-aware shiftkv snapkv --budget 64 --layer 3
    python visualize.py --model llava --methods value-aware shiftkv snapkv --budget 256 --output tiles.png
    python visualize.py --model Qwen/Qwen2.5-VL-7B-Instruct --image page.png --question "What is due?" --budget 128

Each part of the image is coloured by how many KV heads keep its token, and each piece of the prompt's text as well.
What the model answers with each of the caches stands above. Models of the Qwen-VL families and LLaVA-NeXT are
supported. Without `--image` a small model next to this file, "qwen" (the default) or "llava", reads a sample document.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common import (
    METHOD_NAMES,
    METHODS,
    budget,
    errors_in_one_line,
    fill_in_sample,
    image_file,
    model_arguments,
    needs_checkpoint,
    needs_package,
    picture_file,
    script_parser,
    true_answer,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import Cache

# Functions import what takes seconds, so that `--help` answers at once.

RIGHT, WRONG = "right answer", "wrong answer"
MARKS = {RIGHT: "\u2713 ", WRONG: "\u2717 "}  # in the figure only: not every terminal has these letters
VALUE_AWARE = "value-aware"
SELECTING = [*(method for method in METHODS if method != "full"), VALUE_AWARE]
NAMES = {**METHOD_NAMES, VALUE_AWARE: "ShiftKV, value-aware"}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, with image and question filled in from the sample documents where none are given."""
    parser = script_parser(__doc__, model_arguments())
    add = parser.add_argument
    add("--image", type=image_file, help="image file (default: a sample document)")
    add("--question", help="needed with --image (default: the sample document's)")
    add(
        "--budget",
        type=budget,
        default=64,
        help="prompt tokens to keep per layer and head, or the fraction of them in (0, 1] (default: %(default)s)",
    )
    add("--layer", type=int, help="one layer, from 0 (default: all together)")
    add("--methods", nargs="+", choices=SELECTING, default=["shiftkv"], help="side by side (default: %(default)s)")
    add("--output", type=picture_file, default="heatmap.png", help=".png, .svg or .pdf (default: %(default)s)")
    arguments = parser.parse_args(argv)
    fill_in_sample(parser, arguments)
    arguments.methods = list(dict.fromkeys(arguments.methods))
    return arguments


def verdict(answer: str, truth: str | None) -> str:
    """What to call an answer: right or wrong if the truth is known."""
    if truth is None:
        return "answer"
    return RIGHT if answer == truth else WRONG


def one_line(text: str) -> str:
    """The text with " / " for line breaks."""
    return " / ".join(text.splitlines())


def draw(arguments: argparse.Namespace) -> "Figure":
    """The figure of what each method keeps of the prompt; prints what the model answers with it."""
    from PIL import Image

    from mmshiftkv import draw_heatmap, make_cache, visual_token_map
    from tiny_vlm.answering import answer, build_inputs, load

    model, processor = load(arguments.model, arguments.device, arguments.dtype)
    picture = Image.open(arguments.image)
    inputs = build_inputs(processor, [picture], [arguments.question])
    truth = true_answer(arguments.image, arguments.question)

    def answer_with(cache: "Cache") -> tuple[str, str]:
        (text,) = answer(model, processor, inputs, cache, arguments.max_new_tokens)
        return verdict(text.strip(), truth), one_line(text.strip())

    maps = {}
    for method in arguments.methods:
        settings = {"preset": method} if method == VALUE_AWARE else {}
        cache = make_cache("shiftkv" if settings else method, model, arguments.budget, **settings)
        label, text = answer_with(cache)
        token_map = visual_token_map(model, inputs, cache, layer=arguments.layer)
        name = f"{NAMES[method]}, budget {arguments.budget}"
        maps[f"{name}\n{MARKS.get(label, '')}{label}: {text}"] = token_map
        print(f"{name}, {label}: {text}; {100 * token_map.visual_share:.0f} % of the kept tokens are visual")
    label, text = answer_with(make_cache("full", model))
    reference = f"{METHOD_NAMES['full']}, {label}: {text}"
    if truth is not None and label == WRONG:
        reference += f"; true answer: {one_line(truth)}"
    print(reference)
    title = f"{arguments.question}\n{reference}"
    return draw_heatmap(maps, picture, tokenizer=processor.tokenizer, title=title)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    with errors_in_one_line():
        for package in ("PIL", "torchvision"):
            needs_package(package, "vision")
        needs_checkpoint(arguments.model)
        figure = draw(arguments)
    figure.savefig(arguments.output, dpi=200)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
