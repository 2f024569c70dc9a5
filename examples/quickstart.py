"""Ask one question about one image, with the full KV cache and with compressed ones: published and value-aware.

    python quickstart.py
    python quickstart.py --model llava --budget 512 256 128
    python quickstart.py --model Qwen/Qwen2.5-VL-7B-Instruct --image page.png --question "What is due?" --budget 64

Without arguments nothing is downloaded: a small Qwen2.5-VL that reads synthetic documents lies next to this file, and a
small LLaVA-NeXT, `--model llava`, that reads larger ones.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    budget,
    errors_in_one_line,
    fill_in_sample,
    image_file,
    model_arguments,
    needs_checkpoint,
    needs_package,
    script_parser,
)

if TYPE_CHECKING:
    from transformers import DynamicCache

# Functions import what takes seconds, so that `--help` answers at once.
PRESETS = ("published", "value-aware")


@dataclass(frozen=True)
class Row:
    """One line of the table: tokens are those of the prompt, `size` is in bytes and counts all that is stored."""

    cache: str
    seen: int
    kept: int
    size: int
    answer: str


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with image and question filled in from the sample documents where none are given."""
    parser = script_parser(__doc__, model_arguments())
    parser.add_argument("--image", type=image_file, help="image file (default: a sample document)")
    parser.add_argument("--question", help="needed with --image (default: the sample document's)")
    parser.add_argument(
        "--budget",
        type=budget,
        nargs="+",
        default=[128, 64, 32, 16],
        help="prompt tokens to keep per layer and head, or the fraction of them in (0, 1] (default: %(default)s)",
    )
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=PRESETS,
        default=list(PRESETS),
        help="settings to select with (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    fill_in_sample(parser, arguments)
    return arguments


def build_inputs(processor: Any, image: str, question: str) -> Any:
    """The tensors that `generate` takes, for one user message: the image, then the question."""
    from PIL import Image

    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def generate_answer(model: Any, processor: Any, inputs: Any, cache: "DynamicCache", max_new_tokens: int) -> str:
    """The model's greedy answer; `cache` must be empty, and holds prompt and answer afterwards."""
    from mmshiftkv import CACHE_ARGUMENT

    output = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def full_row(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> Row:
    """The row of the library's own cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    answer = generate_answer(model, processor, inputs, cache, max_new_tokens)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    prompt = inputs["input_ids"].shape[1]
    return Row("DynamicCache", prompt, prompt, size, answer)


def compressed_row(
    model: Any, processor: Any, inputs: Any, max_new_tokens: int, tokens: int | float, preset: str
) -> Row:
    """The row of a cache that keeps `tokens` of the prompt, or that fraction of it."""
    from mmshiftkv import ShiftKVCache

    cache = ShiftKVCache(model, budget=tokens, preset=preset)
    answer = generate_answer(model, processor, inputs, cache, max_new_tokens)
    prompt = inputs["input_ids"].shape[1]
    kept = cache.kept_indices(0)
    # A model's first layer may be one that is never compressed, such as a sliding window: it has no kept indices.
    count = prompt if kept is None else kept.shape[-1]
    name = f"ShiftKVCache, budget {tokens}" + (f", {preset}" if preset != "published" else "")
    return Row(name, prompt, count, cache.report().bytes_stored, answer)


def format_table(rows: Sequence[Row]) -> str:
    """The rows under a header, in aligned columns; a line break in an answer becomes " / "."""
    from mmshiftkv.report import format_bytes

    lines = [("cache", "tokens seen", "kept per head", "cache size", "answer")]
    for row in rows:
        answer = " / ".join(row.answer.splitlines())
        lines.append((row.cache, str(row.seen), str(row.kept), format_bytes(row.size), answer))
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        f"{name:{width}}  {seen:>11}  {kept:>13}  {size:>10}  {answer}" for name, seen, kept, size, answer in lines
    )


def measure(arguments: argparse.Namespace) -> list[Row]:
    """The row of the full cache, then one for each budget and preset."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=arguments.dtype).to(arguments.device)
    inputs = build_inputs(processor, arguments.image, arguments.question).to(model.device, model.dtype)
    rows = [full_row(model, processor, inputs, arguments.max_new_tokens)]
    rows += [
        compressed_row(model, processor, inputs, arguments.max_new_tokens, tokens, preset)
        for tokens in arguments.budget
        for preset in arguments.preset
    ]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with these arguments, or with those of the command line."""
    arguments = parse_arguments(argv)
    with errors_in_one_line():
        needs_package("PIL", "vision")
        needs_package("torchvision", "vision")
        needs_checkpoint(arguments.model)
        rows = measure(arguments)
    print(f"image: {Path(arguments.image).name}\nquestion: {arguments.question}\n")
    print(format_table(rows))
    print("\nTokens are those of the prompt; the size also covers the answer and slots reserved for more of it.")


if __name__ == "__main__":
    main()
