"""One family: its tiny model is built, and everything is checked that can be."""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedModel

from mmshiftkv import ShiftKVCache

from .checks import BUDGET, CHECKS, PASSED, Checks, told
from .configs import Family, tiny_config, tiny_model
from .exceptions import NOT_COUNTED
from .generating import answer
from .images import NoImages, image_prompts
from .inputs import text_prompts
from .surroundings import changes, seen_around

# What a family's check may say and still be counted as working.
_FINE = (PASSED, "compiled", "grows: ", "not checked: ")
_ATTENTIONS = ("sdpa", "eager")
# Smaller than a prompt, and than what is decoded behind it.
_SMALL_WINDOW = 16
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size")

Record = dict[str, Any]


class NotCounted(Exception):
    """The family is none that a KV cache for decoders is for; the message says why."""


def examine(family: Family) -> Record:
    """What is recorded of a family.

    Returns:
        "class", "outcome" ("works", "faulty", "refused", "not built" or "not counted") and, but for those that work,
        "reason"; for what was built "attention" and "cache", the layers of its DynamicCache; for those that work or are
        faulty what each check says, by the kind of prompt: "text", "window" (text longer than the sliding window) and
        "images".
    """
    record: Record = {"class": family.class_name}
    try:
        _check_is_counted(family)
        model, record["attention"] = _build(family)
    except NotCounted as reason:
        return {**record, "outcome": "not counted", "reason": str(reason)}
    except Exception as error:
        return {**record, "outcome": "not built", "reason": told(error)}
    try:
        record["cache"] = _layers_of_plain_cache(model)
    except NotCounted as reason:
        return {**record, "outcome": "not counted", "reason": str(reason)}
    return {**record, **_examined(family, model, record)}


def _examined(family: Family, model: PreTrainedModel, record: Record) -> Record:
    before = seen_around(model)
    try:
        ShiftKVCache(model, budget=BUDGET)
    except Exception as error:
        if left := changes(before, seen_around(model)):
            return {"outcome": "faulty", "reason": f"refused, but changed and left so: {', '.join(left)}"}
        return {"outcome": "refused", "reason": told(error)}
    found = {"text": Checks(model, text_prompts()).run(CHECKS), **_with_small_window(family, record)}
    if family.takes_images:
        found["images"] = _with_images(family, model)
    return {**found, **_outcome(found)}


def _with_images(family: Family, model: PreTrainedModel) -> Record:
    try:
        prompts, made_by = image_prompts(family, model.config)
        return {"made by": made_by, **Checks(model, prompts).run(CHECKS)}
    except NoImages as reason:
        return {"all": f"not checked: {reason}"}
    except Exception as error:
        return {"all": told(error)}


def _check_is_counted(family: Family) -> None:
    config_class = CONFIG_MAPPING[family.name]
    if family.name in NOT_COUNTED:
        raise NotCounted(NOT_COUNTED[family.name])
    if getattr(config_class, "is_encoder_decoder", False) or getattr(config_class(), "is_encoder_decoder", False):
        raise NotCounted("an encoder-decoder")
    names = {field.name for field in dataclasses.fields(config_class)}
    if {"is_decoder", "add_cross_attention"} <= names and family.name != "evolla":
        raise NotCounted("an encoder, which decodes as a part of an encoder-decoder only")


def _build(family: Family, **changes: Any) -> tuple[PreTrainedModel, str]:
    for attention in _ATTENTIONS:
        try:
            return tiny_model(family, attention, **changes), attention
        except ValueError as error:
            if attention == _ATTENTIONS[-1] or "attention implementation" not in str(error):
                raise
    raise AssertionError


def _layers_of_plain_cache(model: PreTrainedModel) -> dict[str, int]:
    """How many layers of which kind a DynamicCache has for the model, once it has generated with one."""
    try:
        cache = DynamicCache(config=model.config)
        found = answer(model, text_prompts().first, cache)
    except Exception as error:
        raise NotCounted(f"it does not generate with DynamicCache ({told(error)})") from error
    if not found.logits.isfinite().all():
        raise NotCounted("its tiny model's logits are not finite")
    if not any(getattr(layer, "keys", None) is not None and layer.keys.numel() for layer in cache.layers):
        raise NotCounted("it stores no keys and values in DynamicCache")
    kinds = [type(layer).__name__ for layer in cache.layers]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _with_small_window(family: Family, record: Record) -> Record:
    """The checks again with sliding windows that are smaller than the prompt, if there are any."""
    if not any("Sliding" in kind for kind in record["cache"]):
        return {}
    config = tiny_config(family.name)
    text = config.get_text_config(decoder=True)
    name = next((each for each in _WINDOWS if getattr(text, each, None)), None)
    if name is None:
        return {"window": {"all": "not checked: the setting of its window is not known"}}
    changes: Record = {name: _SMALL_WINDOW}
    part = next((each for each, value in vars(config).items() if value is text), None)
    try:
        model = tiny_model(family, record["attention"], **({part: changes} if part else changes))
        return {"window": Checks(model, text_prompts()).run(CHECKS)}
    except Exception as error:
        return {"window": {"all": told(error)}}


def _outcome(record: Record) -> Record:
    for kind in ("text", "window", "images"):
        for name, result in record.get(kind, {}).items():
            if name != "made by" and not result.startswith(_FINE):
                return {"outcome": "faulty", "reason": f"{kind}, {name.replace('_', ' ')}: {result}"}
    return {"outcome": "works"}
