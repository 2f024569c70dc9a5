"""What the training has to know about each of the two models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)

from tiny_vlm import batches, build, document_questions, forward, llava_batches, llava_build, llava_forward, pages


class Forward(Protocol):
    """A fast forward pass.

    It takes painted pages (pages, 3, height, width), and tokens, offsets and segment numbers of the text, each (pages,
    text). It returns the logits of the text (pages, text, vocabulary) and the features of the patches, in the order of
    the batch's `characters`.
    """

    def __call__(self, pixels: Tensor, inputs: Tensor, offsets: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """The forward pass."""


class Architecture(NamedTuple):
    """One model's configuration, pages and forward pass."""

    model_class: type[Any]
    build_config: Callable[[], PreTrainedConfig]
    build_generation_config: Callable[[], GenerationConfig]
    build_model: Callable[[], PreTrainedModel]  # with new weights
    write_processor: Callable[[str | Path], None]
    tasks: tuple[str, ...]
    make_batch: batches.MakeBatch
    fast_forward: Callable[[Any, torch.dtype, bool], Forward]  # of model, dtype and whether to compile
    check_against_reference: Callable[[Any, str], float]


ARCHITECTURES = {
    "qwen": Architecture(
        model_class=Qwen2_5_VLForConditionalGeneration,
        build_config=build.build_config,
        build_generation_config=build.build_generation_config,
        build_model=build.build_model,
        write_processor=build.write_processor,
        tasks=pages.TASKS,
        make_batch=batches.make_batch,
        fast_forward=forward.FastForward,
        check_against_reference=forward.check_against_reference,
    ),
    "llava": Architecture(
        model_class=LlavaNextForConditionalGeneration,
        build_config=llava_build.build_config,
        build_generation_config=llava_build.build_generation_config,
        build_model=llava_build.build_model,
        write_processor=llava_build.write_processor,
        tasks=document_questions.TASKS,
        make_batch=llava_batches.make_batch,
        fast_forward=llava_forward.FastForward,
        check_against_reference=llava_forward.check_against_reference,
    ),
}
