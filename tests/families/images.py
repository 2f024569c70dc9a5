"""Prompts with images, made by each family's own processor from a tiny tokenizer that is built in place."""

from functools import reduce
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from .configs import Family
from .inputs import Inputs, Prompts
from .recipes import RECIPES, Recipe
from .shrink import FIRST_TEXT_TOKEN, VOCABULARY

# Special tokens that no config names get ids from here on.
_FIRST_FREE_TOKEN = 48
# Width and height.
_IMAGES = ((112, 84), (70, 140))
_WORDS = (17, 8)


class NoImages(Exception):
    """There are no prompts with images for a family; the message says why."""


def image_prompts(family: Family, config: PretrainedConfig) -> tuple[Prompts, str]:
    """Two prompts with an image each, and the class that made them.

    Raises:
        NoImages: the family's processor is not set up here, or needs a package that is not installed.
    """
    recipe = RECIPES.get(family.name)
    if recipe is None:
        raise NoImages("its processor is not set up here")
    try:
        processor = tiny_processor(recipe, config)
    except ImportError as error:
        raise NoImages(str(error).strip()) from error
    texts, images = zip(*(_text_and_image(recipe, *each) for each in zip(_IMAGES, _WORDS, strict=True)), strict=True)

    def made(rows: slice) -> Inputs:
        nested = [[image] for image in images[rows]]
        inputs = dict(processor(text=list(texts[rows]), images=nested, padding=True, return_tensors="pt"))
        inputs.pop("labels", None)
        # Some processors make bfloat16, which is not what these models compute in.
        return {
            name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in inputs.items()
        }

    return Prompts(made(slice(0, 1)), made(slice(1, 2)), made(slice(0, 2))), recipe.processor


def tiny_processor(recipe: Recipe, config: PretrainedConfig) -> Any:
    """A family's processor, with a tokenizer that knows the ids of its tiny config."""
    parts = {name: getattr(transformers, class_name)() for name, class_name in recipe.others.items()}
    image_processor = getattr(transformers, recipe.image_processor)(**recipe.sizes)
    tokenizer = _tokenizer(recipe, config)
    processor_class = getattr(transformers, recipe.processor)
    return processor_class(image_processor=image_processor, tokenizer=tokenizer, **parts, **recipe.settings)


def _tokenizer(recipe: Recipe, config: PretrainedConfig) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{index}": index for index in range(VOCABULARY)}
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": VOCABULARY - 1}
    for free, (text, name) in enumerate(recipe.tokens.items(), _FIRST_FREE_TOKEN):
        special[text] = free if name is None else reduce(getattr, name.split("."), config)
    for text, index in special.items():
        del vocabulary[f"w{index}"]
        vocabulary[text] = index
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=recipe.names,
    )


def _text_and_image(recipe: Recipe, size: tuple[int, int], words: int) -> tuple[str, Image.Image]:
    generator = torch.Generator().manual_seed(words)
    noise = torch.randint(0, 256, (size[1] // 14, size[0] // 14, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(noise.numpy()).resize(size)
    ids = torch.randint(FIRST_TEXT_TOKEN, VOCABULARY - 1, (words,), generator=generator).tolist()
    return recipe.text + " ".join(f"w{index}" for index in ids), image
