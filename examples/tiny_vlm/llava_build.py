"""Configuration, byte-level tokenizer and processor files of the tiny LLaVA-NeXT.

`python -m tiny_vlm.llava_build FOLDER`, run in the folder `examples`, writes everything but the weights.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from tiny_vlm.build import PATCH, byte_alphabet

TILE = 224  # pixels on the side of a tile
PATCHES = TILE // PATCH  # on the side of a tile
# Height and width in pixels of the pages that are cut into tiles without being resized.
TILE_SHAPES = ((224, 224), (224, 448), (448, 224), (448, 448), (448, 672), (672, 448), (672, 672))
UNKNOWN, START, END, IMAGE, PAD = "<unk>", "<s>", "</s>", "<image>", "<pad>"
TOKEN_ID = {token: 256 + index for index, token in enumerate((UNKNOWN, START, END, IMAGE, PAD))}  # below are the bytes
VISION_WIDTH = 192

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% endif %}{{ ' [/INST]' }}{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% endif %}{{ '</s>' }}{% endif %}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and `<s>` in front, as the tokenizers of the large checkpoints put it there."""
    vocabulary = {char: byte for byte, char in enumerate(byte_alphabet())} | TOKEN_ID
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, TOKEN_ID[START])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=32768,
    )


def build_config() -> LlavaNextConfig:
    """The model's configuration: 6 decoder layers of 8 query and 4 KV heads, 5 vision layers, 6.1 million weights."""
    text = MistralConfig(
        vocab_size=256 + len(TOKEN_ID),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        initializer_range=0.04,
        bos_token_id=TOKEN_ID[START],
        eos_token_id=TOKEN_ID[END],
        pad_token_id=TOKEN_ID[PAD],
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=VISION_WIDTH,
    )
    return LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=TOKEN_ID[IMAGE],
        image_grid_pinpoints=[list(shape) for shape in TILE_SHAPES],
        image_seq_length=PATCHES**2,
        vision_feature_layer=-1,  # the whole of the vision tower is used
        vision_feature_select_strategy="default",
        initializer_range=0.04,
        tie_word_embeddings=True,
    )


def build_generation_config() -> GenerationConfig:
    """Greedy decoding up to the end of the answer."""
    return GenerationConfig(
        do_sample=False,
        bos_token_id=TOKEN_ID[START],
        eos_token_id=TOKEN_ID[END],
        pad_token_id=TOKEN_ID[PAD],
    )


def build_processor() -> LlavaNextProcessor:
    """Tokenizer and image processor in one, as every LLaVA-NeXT has them."""
    images = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[list(shape) for shape in TILE_SHAPES],
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the "default" strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def write_processor(folder: str | Path) -> None:
    """Writes the files of tokenizer and image processor, which `AutoProcessor` loads."""
    build_processor().save_pretrained(folder)


def build_model() -> LlavaNextForConditionalGeneration:
    """A new model with random weights."""
    return LlavaNextForConditionalGeneration(build_config())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the tiny LLaVA-NeXT's files, all but the weights.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_processor(folder)
    build_config().save_pretrained(folder)
    build_generation_config().save_pretrained(folder)


if __name__ == "__main__":
    main()
