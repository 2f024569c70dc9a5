"""Qwen2.5-VL with a compressed KV cache: several images, a video, or both.

    python qwen2_5_vl.py --image page1.png --image page2.png --question "What changed between the two pages?"
    python qwen2_5_vl.py --video clip.mp4 --question "What happens?" --budget 256
    python qwen2_5_vl.py --frame 1.png --frame 2.png --frame 3.png --frame 4.png --question "What happens?"

Needs `pip install "mmshiftkv[vision]"`. A video file also needs `torchcodec` and FFmpeg's libraries, which pip does not
install (`apt install ffmpeg`, `conda install ffmpeg`, `brew install ffmpeg`), or `decord`, which brings its own.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from common import (
    errors_in_one_line,
    existing_file,
    family_arguments,
    image_file,
    needs_checkpoint,
    needs_package,
    script_parser,
)

if TYPE_CHECKING:
    from mmshiftkv import CacheReport

# Functions import what takes seconds, so that `--help` answers at once.


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, of which at least one names an image or a video."""
    parser = script_parser(__doc__, family_arguments("Qwen/Qwen2.5-VL-7B-Instruct"))
    parser.add_argument("--image", type=image_file, action="append", default=[], help="image file; may be repeated")
    video = parser.add_mutually_exclusive_group()
    video.add_argument("--video", type=existing_file, help="video file")
    video.add_argument(
        "--frame", type=image_file, action="append", default=[], help="image file of one frame; one for each frame"
    )
    arguments = parser.parse_args(argv)
    if not (arguments.image or arguments.video or arguments.frame):
        parser.error("needs an --image, a --video or several --frame")
    return arguments


def needs_video(file: str) -> None:
    """Raises argparse.ArgumentTypeError unless this is a video that qwen-vl-utils can read here.

    It takes torchcodec where that is installed, with or without FFmpeg, and decord otherwise.
    """
    if not (find_spec("torchcodec") or find_spec("decord")):
        raise argparse.ArgumentTypeError(
            "--video needs torchcodec (pip install torchcodec) and FFmpeg's libraries (apt install ffmpeg), or decord "
            "(pip install decord); without them, give the frames with --frame"
        )
    try:
        if find_spec("torchcodec"):
            import_module("torchcodec.decoders").VideoDecoder(file)
        else:
            import_module("decord").VideoReader(file)
    except (ImportError, OSError, RuntimeError) as error:
        if "load libtorchcodec" in str(error):
            raise argparse.ArgumentTypeError(
                "torchcodec does not load: it needs FFmpeg's libraries (apt install ffmpeg) and the torch that it was "
                "built for; without them, give the frames with --frame"
            ) from error
        raise argparse.ArgumentTypeError(f"not a video that can be read: {file!r}") from error


def build_messages(images: Sequence[str], video: str | Sequence[str] | None, question: str) -> list[dict[str, Any]]:
    """One user message: images, video (its file, or its frames in files, two for each second), question."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    if video:
        content.append({"type": "video", "video": video})
    content.append({"type": "text", "text": question})
    return [{"role": "user", "content": content}]


def build_inputs(processor: Any, messages: list[dict[str, Any]]) -> Any:
    """The tensors that `generate` takes."""
    from qwen_vl_utils import process_vision_info

    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, options = process_vision_info(messages, return_video_kwargs=True, return_video_metadata=True)
    if videos is not None:
        # transformers 5 takes the frame rate from the metadata; it refuses the list of rates that
        # process_vision_info returns when it is not asked for metadata.
        videos, options["video_metadata"] = (list(part) for part in zip(*videos, strict=True))
    return processor(text=[prompt], images=images, videos=videos, return_tensors="pt", **options)


def ask(arguments: argparse.Namespace) -> tuple[str, "CacheReport"]:
    """The model's greedy answer, and what its cache kept."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache

    processor = AutoProcessor.from_pretrained(arguments.model)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        arguments.model,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn,
        device_map=arguments.device_map,
    )
    messages = build_messages(arguments.image, arguments.video or arguments.frame, arguments.question)
    inputs = build_inputs(processor, messages).to(model.device)

    cache = ShiftKVCache(model, budget=arguments.budget)
    output = model.generate(
        **inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=arguments.max_new_tokens, do_sample=False
    )
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), cache.report()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with these arguments, or with those of the command line."""
    arguments = parse_arguments(argv)
    with errors_in_one_line():
        for package in ("PIL", "accelerate", "torchvision", "qwen_vl_utils"):
            needs_package(package, "vision")
        if arguments.video:
            needs_video(arguments.video)
        needs_checkpoint(arguments.model)
        answer, report = ask(arguments)
    print(answer)
    print(report)


if __name__ == "__main__":
    main()
