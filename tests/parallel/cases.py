"""What is done once by one process and once by two that share the model: what both give must be the same.

A case is a function of a `Loaded`; it gives JSON, and under "kept" a list of (batch, KV heads, kept) tensors, of which
each process has its own heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import models
from mmshiftkv import (
    CACHE_ARGUMENT,
    Conversation,
    Document,
    PrefillSelectionCache,
    ShiftKVCache,
    decode_ahead,
    make_cache,
    measure_statistics,
)
from tiny_llava import document_image

PROMPTS = models.left_padded([40, 29, 17])
PAGES = [document_image(224, 168), document_image(140, 280)]


@dataclass
class Loaded:
    """A model, whole or shared; `name` tells the files of several processes apart."""

    model: PreTrainedModel
    processor: Any
    folder: Path
    name: str

    def images(self) -> dict[str, torch.Tensor]:
        return models.VisionCase(self.model, self.processor).prompts(2)


Case = Callable[[Loaded], dict[str, Any]]


def answer(loaded, cache, inputs=PROMPTS, **options):
    """Tokens of an answer, greedy unless told otherwise, and what is kept."""
    torch.manual_seed(0)
    given = {"max_new_tokens": 8, "do_sample": False, CACHE_ARGUMENT: cache, **inputs, **options}
    return {"tokens": loaded.model.generate(**given).tolist(), "kept": kept_of(cache)}


def kept_of(cache: PrefillSelectionCache) -> list[torch.Tensor]:
    found = [cache.kept_indices(index) for index in range(len(cache.layers))]
    return [kept for kept in found if kept is not None]


def method(name, loaded, *, budget=8, options=None, **settings):
    cache = make_cache(name, loaded.model, budget, **settings)
    return answer(loaded, cache, **(options or {}))


def images(loaded, **settings):
    return answer(loaded, ShiftKVCache(loaded.model, budget=24, **settings), loaded.images())


def second_turn(loaded):
    cache = ShiftKVCache(loaded.model, budget=8, preset="value-aware")
    first = answer(loaded, cache, {"input_ids": models.prompt_ids()})
    ids = torch.cat([torch.tensor(first["tokens"]), models.prompt_ids(tokens=5, seed=1)], dim=1)
    return answer(loaded, cache, {"input_ids": ids})


def statistics(loaded):
    return {"table": str(measure_statistics(loaded.model, [PROMPTS], max_new_tokens=4))}


def report(loaded):
    cache = ShiftKVCache(loaded.model, budget=8)
    answer(loaded, cache)
    found = cache.report()
    return {"report": str(found), "bytes": found.bytes_stored}


def saved(loaded):
    """A cache in a file goes on as the one that was saved; the refusal of another rank's file is noted."""
    cache = ShiftKVCache(loaded.model, budget=8)
    answer(loaded, cache, {"input_ids": models.prompt_ids()})
    path = loaded.folder / f"saved-{loaded.name}.safetensors"
    cache.save(path)
    with torch.no_grad():
        token = torch.tensor([[5]])
        logits = [
            loaded.model(token, **{CACHE_ARGUMENT: one}).logits
            for one in (ShiftKVCache.load(path, loaded.model), cache)
        ]
    return {"goes on": torch.equal(*logits), "message": refusal(ShiftKVCache.load, path_of_whole(loaded), loaded.model)}


def path_of_whole(loaded):
    """The file that one process saved, which is written before the two begin."""
    return loaded.folder / "saved-whole.safetensors"


def conversation(loaded, **settings):
    """Two turns, the second one streamed; an answer cannot be ended early by one of several processes."""
    chat = Conversation(loaded.model, loaded.processor, budget=24, max_new_tokens=8, **settings)
    first = chat.ask("What is the Total?", images=PAGES[0])
    twin = chat.fork()
    second = "".join(chat.ask("And the date?", images=PAGES[1], stream=True)).strip()
    return {"answers": [first, second, twin.ask("And the date?", images=PAGES[1])], "kept": kept_of(chat.cache)}


def document(loaded, **settings):
    page = Document(loaded.model, loaded.processor, PAGES, budget=24, max_new_tokens=8, **settings)
    path = loaded.folder / f"document-{loaded.name}.safetensors"
    page.save(path)
    again = Document.load(path, loaded.model, loaded.processor)
    asked = ["What is the Total?", "Read line 1 of the second page."]
    return {"answers": page.ask(asked), "again": [again.ask(one) for one in asked], "kept": kept_of(page.cache)}


def closed_stream(loaded):
    """What `close` of a stream says while the answer is being made."""
    chat = Conversation(loaded.model, loaded.processor, budget=24, max_new_tokens=48)
    stream = chat.ask("What is the Total?", images=PAGES[0], stream=True)
    message = refusal(stream.close)
    return {"message": message, "rest": "".join(stream) if message else ""}


def refused(loaded):
    return {"message": refusal(ShiftKVCache, loaded.model, budget=8)}


def refusal(function, *args, **settings) -> str | None:
    try:
        function(*args, **settings)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


PRESETS = {"published": {}, "value-aware": {"preset": "value-aware"}}
_PEERS = {"snapkv": {"window": 4}, "expected_attention": {}, "keydiff": {}, "streaming_llm": {}, "random": {}}
_FIXED = {"max_new_tokens": 8}
_WAYS = {
    "fixed": _FIXED,
    "decoded ahead": {**_FIXED, "options": {"custom_generate": decode_ahead}},
    "beams": {"options": {"num_beams": 3}},
    "chunks": {"options": {"prefill_chunk_size": 16}},
    "sampled": {"options": {"do_sample": True}},
    "assisted": {"options": {"inputs": {"input_ids": models.prompt_ids()}, "prompt_lookup_num_tokens": 3}},
    "share": {"budget": 0.3},
}

# By the name of the model, and of what is done with it.
CASES: dict[tuple[str, str], Case] = {
    **{
        (model, name): partial(method, "shiftkv", **settings)
        for model in ("heads", "one head each", "sinks", "heads everywhere", "asked")
        for name, settings in PRESETS.items()
    },
    **{(model, name): partial(images, **given) for model in ("qwen", "llava") for name, given in PRESETS.items()},
    **{("heads", way): partial(method, "shiftkv", preset="value-aware", **given) for way, given in _WAYS.items()},
    **{("heads", name): partial(method, name, **settings) for name, settings in _PEERS.items()},
    ("heads", "second turn"): second_turn,
    ("heads", "calibration"): statistics,
    ("heads", "report"): report,
    ("heads", "saved"): saved,
    ("qwen", "conversation"): conversation,
    ("llava", "conversation, decoded ahead"): partial(conversation, decode_ahead=True),
    ("qwen", "document"): document,
    ("llava", "document, decoded ahead"): partial(document, decode_ahead=True),
    ("qwen", "closed stream"): closed_stream,
    ("too few heads", "refused"): refused,
    ("latents", "value-aware"): partial(method, "shiftkv", preset="value-aware"),
    ("latents", "whole prompt"): partial(method, "shiftkv", budget=1.0),
}
