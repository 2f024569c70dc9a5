"""What `generate` was given, as far as a cache has to know it.

`generate` tells a cache neither where a prompt ends that it prefills in chunks, nor which tokens of a pass are
candidates of assisted decoding, and a decoding loop of another's no streamer.  It knows all of it, and is running while
it calls the model or the loop; so it is read off its frames.  Nothing is changed there.
"""

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from transformers.generation import utils

from .arguments import CACHE_ARGUMENTS


@dataclass(frozen=True)
class GenerateCall:
    """One call of `generate` with a certain cache, in the forward pass under way.

    Attributes:
        ids: (B, T) int64, all tokens so far, candidates left out; None if only new ones, or embeddings, were given.
        prompt: columns of the prompt, if the pass is not simply all of it: if it comes in chunks, or with candidates.
        columns: how many columns the cache is meant to have seen after the pass; None if that is not known.
        uses_cache: whether later passes hold new tokens only; else each holds the whole text once more.
    """

    ids: torch.Tensor | None
    prompt: int | None
    columns: int | None
    uses_cache: bool


@torch.compiler.disable
def generate_call(cache: Any) -> GenerateCall | None:
    """The call of `generate` that is prefilling this cache, or verifying candidates with it; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_generate(frame, "_prefill", "_assisted_decoding"):
            values = frame.f_locals
            if any(values["model_kwargs"].get(name) is cache for name in CACHE_ARGUMENTS):
                return _assisted(values) if frame.f_code.co_name == "_assisted_decoding" else _prefilled(values)
        frame = frame.f_back
    return None


@torch.compiler.disable
def is_compiling_prefill() -> bool:
    """Whether `generate` is just asking whether to compile the chunks of a prefill, or passes with candidates."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_generate(frame, "_valid_auto_compile_criteria"):
        frame = frame.f_back
    caller = None if frame is None else frame.f_back
    return caller is not None and _is_generate(caller, "_prefill", "_assisted_decoding")


def streamer_of_generate() -> Any:
    """The streamer that the innermost running `generate` was given; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_generate(frame, "generate"):
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("streamer")


def _is_generate(frame: FrameType, *names: str) -> bool:
    return frame.f_code.co_name in names and frame.f_globals.get("__name__") == utils.__name__


def _prefilled(values: dict[str, Any]) -> GenerateCall:
    ids, chunks = values["input_ids"], values.get("input_chunks")
    mask = values.get("attention_mask")
    # A mask of other length than the ids says that these are new ones; where it is all ones, its length alone is left.
    width = values.get("mask_length", ids.shape[1] if mask is None else mask.shape[1])
    if values["model_kwargs"].get("inputs_embeds") is not None or width != ids.shape[1]:
        ids = None
    uses_cache = values["model_kwargs"].get("use_cache") is not False
    if chunks is None:
        return GenerateCall(ids, None, None if ids is None else ids.shape[1], uses_cache)
    lengths = [chunk.shape[-1] for chunk in chunks]
    place = next(place for place, chunk in enumerate(chunks) if chunk is values["input_chunk"])
    columns = None if ids is None else ids.shape[1] - sum(lengths[place + 1 :])
    return GenerateCall(ids, sum(lengths), columns, uses_cache)


def _assisted(values: dict[str, Any]) -> GenerateCall | None:
    if not values["is_first_iteration"]:
        return None
    ids, length = values["input_ids"], values["cur_len"]
    mask = values["model_kwargs"].get("attention_mask")
    width = getattr(values["generation_config"], "_mask_length", length) if mask is None else mask.shape[1]
    return GenerateCall(ids if width == length else None, length, length + values["candidate_length"], True)
