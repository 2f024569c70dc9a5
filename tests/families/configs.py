"""The model families of transformers, each with a tiny model of its own classes."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .exceptions import EXCEPTIONS
from .recipes import RECIPES
from .shrink import LAYERS, merged, parts_of, shrunk


@dataclass(frozen=True)
class Family:
    """A model type of transformers, and the class that generates text with it.

    Attributes:
        name: the model type.
        class_name: of the model.
        takes_images: whether the class takes images and text.
    """

    name: str
    class_name: str
    takes_images: bool


def all_families() -> list[Family]:
    """Every model type of the mappings for causal language models and for image-text-to-text models, by name."""
    classes = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    takes_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [Family(name, classes[name], name in takes_images or name in RECIPES) for name in sorted(classes)]


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """A tiny config of a model type.

    Args:
        name: the model type.
        changes: settings on top.
    """
    config_class = CONFIG_MAPPING[name]
    changes = merged(EXCEPTIONS.get(name, {}), changes)
    settings = merged(shrunk(config_class()), changes)
    return with_all_kinds_of_layers(config_class, settings)


def tiny_model(family: Family, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A tiny random model in float32, of the family's own class."""
    config = tiny_config(family.name, **changes)
    model_class = getattr(transformers, family.class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def with_all_kinds_of_layers(config_class: type[PretrainedConfig], settings: dict[str, Any]) -> PretrainedConfig:
    """A config of these settings whose few layers are of all the kinds that the family's many layers are."""
    usual, config = config_class(), config_class(**settings)
    kinds, present = (_kinds_of_layers(each) for each in (usual, config))
    if set(kinds) <= set(present):
        return config
    # Full attention comes last, where some families want it.
    kinds.sort(key=lambda kind: kind == "full_attention")
    count = max(LAYERS, len(kinds))
    changes: dict[str, Any] = {
        "layer_types": [kinds[index % len(kinds)] for index in range(count)],
        "num_hidden_layers": count,
    }
    text = config.get_text_config(decoder=True)
    for name in parts_of(config_class):
        if getattr(config, name, None) is text:
            changes = {name: changes}
    return config_class(**merged(settings, changes))


def _kinds_of_layers(config: PretrainedConfig) -> list[str]:
    text = config.get_text_config(decoder=True)
    return list(dict.fromkeys(getattr(text, "layer_types", None) or []))
