"""Configuration, byte-level tokenizer and processor files of the tiny Qwen2.5-VL.

`python -m tiny_vlm.build FOLDER`, run in the folder `examples`, writes everything but the weights.
"""

import argparse
import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE  # pixels on the side of one visual token
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TOKEN_ID = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}  # the ids below are the bytes
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE uses for each byte, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    alphabet = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    if sorted(alphabet) != sorted(ByteLevel.alphabet()):
        raise RuntimeError("the installed tokenizers package uses another byte alphabet")
    return alphabet


def build_tokenizer() -> Qwen2Tokenizer:
    """One token per byte: the vocabulary has no merges."""
    tokenizer = Qwen2Tokenizer(
        vocab={char: byte for byte, char in enumerate(byte_alphabet())} | TOKEN_ID,
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[],
        model_max_length=32768,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config() -> Qwen2_5_VLConfig:
    """The model's configuration: 6 decoder layers of 8 query and 2 KV heads, 4 vision blocks, 5.9 million weights."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 256 + len(SPECIAL_TOKENS),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            # The width section gets the lowest frequencies: a small base keeps them fit for 12 to 20 columns.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": TOKEN_ID["<|endoftext|>"],
            "eos_token_id": TOKEN_ID["<|im_end|>"],
            "pad_token_id": TOKEN_ID["<|endoftext|>"],
            "initializer_range": 0.04,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_heads": 6,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 256,
            "window_size": 8 * PATCH,
            "fullatt_block_indexes": [0, 1, 2, 3],
            "initializer_range": 0.04,
        },
        image_token_id=TOKEN_ID["<|image_pad|>"],
        video_token_id=TOKEN_ID["<|video_pad|>"],
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_model() -> Qwen2_5_VLForConditionalGeneration:
    """A new model with random weights."""
    return Qwen2_5_VLForConditionalGeneration(build_config())


def build_generation_config() -> GenerationConfig:
    """Greedy decoding up to the end of the turn."""
    return GenerationConfig(
        do_sample=False,
        eos_token_id=[TOKEN_ID["<|im_end|>"], TOKEN_ID["<|endoftext|>"]],
        pad_token_id=TOKEN_ID["<|endoftext|>"],
        bos_token_id=TOKEN_ID["<|endoftext|>"],
    )


def write_processor(folder: str | Path) -> None:
    """Writes the files of tokenizer, image processor and video processor, which `AutoProcessor` loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(folder)
    common = {
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "size": {"shortest_edge": 4 * CELL**2, "longest_edge": 1280 * CELL**2},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    files = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **common},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor", **common},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the tiny Qwen2.5-VL's files, all but the weights.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_processor(folder)
    build_config().save_pretrained(folder)
    build_generation_config().save_pretrained(folder)


if __name__ == "__main__":
    main()
