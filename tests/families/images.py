"""Prompts with images, made by each family's own processor from a tiny tokenizer that is built in place."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .configs import Family


@dataclass(frozen=True)
class ImagePrompt:
    """Two prompts of different lengths with an image each, or why there are none.

    Attributes:
        made_by: the processor's class, or "not checked: " and why.
        inputs, second: what `generate` takes, of one row; None where there are none.
        is_needed: whether the model generates from nothing else.
    """

    made_by: str
    inputs: dict[str, Any] | None = None
    second: dict[str, Any] | None = None
    is_needed: bool = False


def image_prompt(family: Family, model: PreTrainedModel) -> ImagePrompt:
    """Prompts with images for a model of the family."""
    return ImagePrompt("not checked: takes no images")
