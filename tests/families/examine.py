"""One family: its tiny model is built, and everything is checked that can be."""

import dataclasses
import warnings
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from mmshiftkv import ShiftKVCache

from .checks import BUDGET, CHECKS, PASSED, Checks
from .configs import Family, tiny_config, tiny_model
from .generating import answer
from .images import image_prompt
from .inputs import prompt
from .surroundings import changes, seen_around

# What a family's check may say and still be counted as working.
_FINE = (PASSED, "compiled", "grows: ", "not checked: ")
_ATTENTIONS = ("sdpa", "eager")
# Smaller than a prompt, and than what is decoded behind it.
_SMALL_WINDOW = 16

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
        config = tiny_config(family.name)
        _check_is_decoder(family, config)
        model, record["attention"] = _build(family)
    except NotCounted as reason:
        return {**record, "outcome": "not counted", "reason": str(reason)}
    except Exception as error:
        return {**record, "outcome": "not built", "reason": _told(error)}
    try:
        images = image_prompt(family, model)
        record["cache"] = _layers_of_plain_cache(model, images.inputs if images.is_needed else prompt())
    except NotCounted as reason:
        return {**record, "outcome": "not counted", "reason": str(reason)}
    before = seen_around(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ShiftKVCache(model, budget=BUDGET)
    except Exception as error:
        record |= {"outcome": "refused", "reason": _told(error)}
    else:
        if not images.is_needed:
            record["text"] = Checks(model, prompt()).run(CHECKS)
            record |= _with_small_window(family, record["cache"], record["attention"])
        if images.inputs is not None:
            made_by = {"made by": images.made_by}
            record["images"] = {**made_by, **Checks(model, images.inputs, images.second).run(CHECKS)}
        elif family.takes_images:
            record["images"] = {"made by": images.made_by}
        record |= _outcome(record)
    left = changes(before, seen_around(model))
    if left:
        record |= {"outcome": "faulty", "reason": f"changed and left so: {', '.join(left)}"}
    return record


def _check_is_decoder(family: Family, config: PretrainedConfig) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise NotCounted("an encoder-decoder")
    names = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    if {"is_decoder", "add_cross_attention"} <= names and not config.is_decoder and family.name != "evolla":
        raise NotCounted("an encoder, which decodes as a part of an encoder-decoder only")


def _build(family: Family, **changes: Any) -> tuple[PreTrainedModel, str]:
    for attention in _ATTENTIONS:
        try:
            return tiny_model(family, attention, **changes), attention
        except ValueError as error:
            if attention == _ATTENTIONS[-1] or "attention implementation" not in str(error):
                raise
    raise AssertionError


def _layers_of_plain_cache(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many layers of which kind a DynamicCache has for the model, once it has generated with one."""
    cache = DynamicCache(config=model.config)
    try:
        found = answer(model, inputs, cache)
    except Exception as error:
        raise NotCounted(f"it does not generate with DynamicCache ({_told(error)})") from error
    if not found.logits.isfinite().all():
        raise NotCounted("its tiny model's logits are not finite")
    if not any(getattr(layer, "keys", None) is not None and layer.keys.numel() for layer in cache.layers):
        raise NotCounted("it stores no keys and values in DynamicCache")
    kinds = [type(layer).__name__ for layer in cache.layers]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _with_small_window(family: Family, cache: dict[str, int], attention: str) -> Record:
    """The checks again with sliding windows that are smaller than the prompt, if there are any."""
    if not any("Sliding" in kind for kind in cache):
        return {}
    config = tiny_config(family.name)
    text = config.get_text_config(decoder=True)
    name = next((each for each in ("sliding_window", "sliding_window_size") if getattr(text, each, None)), None)
    if name is None:
        return {"window": {"all": "not checked: the setting of its window is not known"}}
    changes: Record = {name: _SMALL_WINDOW}
    part = next((each for each, value in vars(config).items() if value is text), None)
    try:
        model = tiny_model(family, attention, **({part: changes} if part else changes))
        return {"window": Checks(model, prompt()).run(CHECKS)}
    except Exception as error:
        return {"window": {"all": _told(error)}}


def _outcome(record: Record) -> Record:
    for kind in ("text", "window", "images"):
        for name, result in record.get(kind, {}).items():
            if name != "made by" and not result.startswith(_FINE):
                return {"outcome": "faulty", "reason": f"{kind}, {name.replace('_', ' ')}: {result}"}
    return {"outcome": "works"}


def _told(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
