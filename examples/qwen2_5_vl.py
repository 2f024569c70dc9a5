"""Qwen2.5-VL with a compressed KV cache: several images, a video, or both.

    python qwen2_5_vl.py --image page1.png --image page2.png --question "What changed between the two pages?"
    python qwen2_5_vl.py --video clip.mp4 --question "What happens?" --budget 256
    python qwen2_5_vl.py --frame 1.png --frame 2.png --frame 3.png --frame 4.png --question "What happens?"

Needs `qwen-vl-utils` and `accelerate`; a video file also needs `torchcodec`.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from qwen_vl_utils import process_vision_info
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from common import existing_file, family_arguments
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, of which at least one names an image or a video."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], parents=[family_arguments("Qwen/Qwen2.5-VL-7B-Instruct")]
    )
    parser.add_argument("--image", type=existing_file, action="append", default=[], help="image file; may be repeated")
    video = parser.add_mutually_exclusive_group()
    video.add_argument("--video", type=existing_file, help="video file")
    video.add_argument(
        "--frame", type=existing_file, action="append", default=[], help="image file of one frame; one for each frame"
    )
    arguments = parser.parse_args(argv)
    if not (arguments.image or arguments.video or arguments.frame):
        parser.error("needs an --image, a --video or several --frame")
    if arguments.video and not (find_spec("torchcodec") or find_spec("decord")):
        parser.error("--video needs torchcodec (pip install torchcodec); without it, give the frames with --frame")
    return arguments


def build_messages(images: Sequence[str], video: str | Sequence[str] | None, question: str) -> list[dict[str, Any]]:
    """One user message: images, video (its file, or its frames in files, two for each second), question."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    if video:
        content.append({"type": "video", "video": video})
    content.append({"type": "text", "text": question})
    return [{"role": "user", "content": content}]


def build_inputs(processor: Any, messages: list[dict[str, Any]]) -> Any:
    """The tensors that `generate` takes."""
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, options = process_vision_info(messages, return_video_kwargs=True, return_video_metadata=True)
    if videos is not None:
        # transformers 5 takes the frame rate from the metadata; it refuses the list of rates that
        # process_vision_info returns when it is not asked for metadata.
        videos, options["video_metadata"] = (list(part) for part in zip(*videos, strict=True))
    return processor(text=[prompt], images=images, videos=videos, return_tensors="pt", **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with these arguments, or with those of the command line."""
    arguments = parse_arguments(argv)
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
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(cache.report())


if __name__ == "__main__":
    main()
