"""Draw which parts of an image, and which words of the question, stay in a compressed KV cache.

    python visualize.py --output heatmap.png
    python visualize.py --methods shiftkv snapkv keydiff --budget 64 --layer 3
    python visualize.py --model Qwen/Qwen2.5-VL-7B-Instruct --image page.png --question "What is due?" --budget 128

Each part of the image is coloured by how many KV heads keep its token, and each piece of the prompt's text as well.
Models of the Qwen-VL families and LLaVA-NeXT are supported. Without `--model` and `--image` the small Qwen2.5-VL next
to this file reads a sample document.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common import DTYPES, budget, existing_file, output_file, positive_integer
from mmshiftkv import METHODS, VisualTokenMap, draw_heatmap, make_cache, visual_token_map
from tiny_vlm.answering import answer, build_inputs, load

ASSETS = Path(__file__).resolve().parent / "assets"
SELECTING = [method for method in METHODS if method != "full"]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, with image and question filled in from the sample documents where none are given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add(
        "--model",
        default=str(ASSETS / "tiny_qwen2_5_vl"),
        help="hub id or local folder (default: the model next to this script)",
    )
    add("--image", type=existing_file, help="image file (default: a sample document)")
    add("--question", help="needed with --image (default: the sample document's)")
    add("--budget", type=budget, default=64, help="prompt tokens to keep per layer and head, or the fraction of them")
    add("--layer", type=int, help="one layer, from 0 (default: all together)")
    add("--methods", nargs="+", choices=SELECTING, default=["shiftkv"], help="side by side (default: %(default)s)")
    add("--max-new-tokens", type=positive_integer, default=64, help="of the answer (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="auto", help="default: that of the checkpoint")
    add("--output", type=output_file, default="heatmap.png", help=".png, .svg or .pdf (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.image is not None and arguments.question is None:
        parser.error("--image needs a --question")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error('drawing needs matplotlib: pip install "mmshiftkv[plot]"')
    if arguments.image is None:
        documents = json.loads((ASSETS / "documents.json").read_text(encoding="utf-8"))
        name, questions = next(iter(documents.items()))
        arguments.image = str(ASSETS / name)
        arguments.question = arguments.question or questions[0]["question"]
    arguments.methods = list(dict.fromkeys(arguments.methods))
    return arguments


def maps_and_answers(
    model: Any, processor: Any, picture: Image.Image, arguments: argparse.Namespace
) -> dict[str, tuple[VisualTokenMap, str]]:
    """What each method keeps of the prompt, and what the model answers with it."""
    inputs = build_inputs(processor, [picture], [arguments.question])
    result = {}
    for method in arguments.methods:
        cache = make_cache(method, model, arguments.budget)
        (text,) = answer(model, processor, inputs, cache, arguments.max_new_tokens)
        result[method] = visual_token_map(model, inputs, cache, layer=arguments.layer), text.strip()
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    model, processor = load(arguments.model, arguments.device, arguments.dtype)
    picture = Image.open(arguments.image)
    try:
        found = maps_and_answers(model, processor, picture, arguments)
    except (TypeError, ValueError) as error:  # a layer, a budget or a model that will not do
        raise SystemExit(f"error: {error}") from error
    maps = {}
    for method, (token_map, text) in found.items():
        one_line = " / ".join(text.splitlines())
        print(f"{method}: {100 * token_map.visual_share:.0f} % of the kept tokens are visual; answer: {one_line}")
        maps[f"{method}, budget {arguments.budget}: {one_line}"] = token_map
    figure = draw_heatmap(maps, picture, tokenizer=processor.tokenizer, title=arguments.question)
    figure.savefig(arguments.output, dpi=150)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
