"""LLaVA-NeXT (LLaVA-1.6 with Vicuna or Mistral) with a compressed KV cache.

    python llava_next.py --model llava --image assets/form.png --question "What is the Status?" --budget 256
    python llava_next.py --image page.png --question "What is the total?"
    python llava_next.py --model llava-hf/llava-v1.6-mistral-7b-hf --image chart.png --budget 128

The model "llava" lies next to this file: small, and trained to read such pages alone. Needs
`pip install "mmshiftkv[vision]"`.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common import errors_in_one_line, family_arguments, image_file, needs_checkpoint, needs_package, script_parser

if TYPE_CHECKING:
    from mmshiftkv import CacheReport

# Functions import what takes seconds, so that `--help` answers at once.


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, of which at least one names an image."""
    parser = script_parser(__doc__, family_arguments("llava-hf/llava-v1.6-vicuna-7b-hf"))
    parser.add_argument("--image", type=image_file, action="append", required=True, help="image file; may be repeated")
    return parser.parse_args(argv)


def build_inputs(processor: Any, images: Sequence[str], question: str) -> Any:
    """The tensors that `generate` takes, for one user message: the images, then the question."""
    from PIL import Image

    content: list[dict[str, Any]] = [{"type": "image", "image": Image.open(image)} for image in images]
    content.append({"type": "text", "text": question})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def ask(arguments: argparse.Namespace) -> tuple[str, "CacheReport"]:
    """The model's greedy answer, and what its cache kept."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache

    processor = LlavaNextProcessor.from_pretrained(arguments.model)
    model = LlavaNextForConditionalGeneration.from_pretrained(
        arguments.model,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn,
        device_map=arguments.device_map,
    )
    inputs = build_inputs(processor, arguments.image, arguments.question).to(model.device, model.dtype)

    cache = ShiftKVCache(model, budget=arguments.budget)
    output = model.generate(
        **inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=arguments.max_new_tokens, do_sample=False
    )
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), cache.report()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with these arguments, or with those of the command line."""
    arguments = parse_arguments(argv)
    with errors_in_one_line():
        for package in ("PIL", "accelerate", "torchvision"):
            needs_package(package, "vision")
        needs_checkpoint(arguments.model)
        answer, report = ask(arguments)
    print(answer)
    print(report)


if __name__ == "__main__":
    main()
