"""Tiny random LLaVA-NeXT checkpoints with the real processor classes, and an image to show them.

The answers of such a model are noise, but depend on the image and on every token, and are the same in every run.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

FAMILIES = ("vicuna", "mistral")
IMAGE_SIZE, PATCH_SIZE = 56, 14
TILE_SHAPES = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # (height, width), as in the real checkpoints

BOS, EOS, UNK, IMAGE, PAD = "<s>", "</s>", "<unk>", "<image>", "<pad>"
TOKENS = (UNK, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), IMAGE, PAD)
TOKEN_ID = {token: number for number, token in enumerate(TOKENS)}

IMAGES_FIRST = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
)
CHAT_TEMPLATES = {
    "vicuna": "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    + IMAGES_FIRST
    + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "mistral": "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + IMAGES_FIRST
    + "{{ ' [/INST]' }}{% else %}{{ ' ' }}"
    + IMAGES_FIRST
    + "</s>{% endif %}{% endfor %}",
}


def save_tiny_llava(folder: str | Path, family: str = "vicuna") -> None:
    """Write weights (float32) and processor files of a LLaVA-NeXT whose text model is a Llama ("vicuna") or a Mistral.

    The weights are the same in every call, and torch's global random state is left as it was.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    # Only the CPU generator is used: torch.manual_seed would also reseed the GPUs.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(FAMILIES.index(family))
        model = LlavaNextForConditionalGeneration(_config(family))
    model.generation_config = GenerationConfig(
        bos_token_id=TOKEN_ID[BOS], eos_token_id=TOKEN_ID[EOS], pad_token_id=TOKEN_ID[PAD]
    )
    model.save_pretrained(folder)
    _processor(family).save_pretrained(folder)


def document_image(width: int, height: int) -> Image.Image:
    """A page of numbered lines, RGB; the same pixels for the same size in pixels."""
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for number, top in enumerate(range(4, height, 16), start=1):
        draw.text((4, top), f"Line {number}: {number * 7919 % 10_000:04d}", fill="black")
    return page


def _config(family: str) -> LlavaNextConfig:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=32,
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=_text_config(family),
        image_token_index=TOKEN_ID[IMAGE],
        image_grid_pinpoints=TILE_SHAPES,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )


def _text_config(family: str) -> PreTrainedConfig:
    common = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,  # large enough for attention to matter: with 0.02 every answer is one repeated token
        "bos_token_id": TOKEN_ID[BOS],
        "eos_token_id": TOKEN_ID[EOS],
        "pad_token_id": TOKEN_ID[PAD],
    }
    if family == "mistral":
        return MistralConfig(num_key_value_heads=2, sliding_window=None, **common)
    return LlamaConfig(num_key_value_heads=4, **common)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and `<s>` in front, as the tokenizers of the real checkpoints do."""
    tokenizer = Tokenizer(models.BPE(vocab=TOKEN_ID, merges=[], unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, TOKEN_ID[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=4096,
    )


def _processor(family: str) -> LlavaNextProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = LlavaNextImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_grid_pinpoints=TILE_SHAPES
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token of CLIP, which the "default" strategy drops again
        chat_template=CHAT_TEMPLATES[family],
    )
