"""Questions about images, answered by a model and its processor; any chat model that transformers can load will do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Cache

from mmshiftkv import CACHE_ARGUMENT

# Room for the longest answer that a page can have, by task.
MAX_NEW_TOKENS = {"lookup": 24, "multi": 64, "line": 64, "cell": 24, "all": 320}


def load(folder: str | Path, device: torch.device | str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """The model in evaluation mode, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
    return model, AutoProcessor.from_pretrained(folder)


def build_inputs(processor: Any, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
    """Model inputs of one prompt for each pair of image and question; shorter prompts are padded on the left."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def answer_tokens(model: Any, inputs: Any, cache: Cache, max_new_tokens: int) -> torch.Tensor:
    """The greedy answers to the prompts of `build_inputs`, (B, n) ids; `cache` is new and serves this call only."""
    inputs = inputs.to(model.device, model.dtype)
    output = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=max_new_tokens, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :]


def answer(model: Any, processor: Any, inputs: Any, cache: Cache, max_new_tokens: int) -> list[str]:
    """The text of each of the `answer_tokens`."""
    tokens = answer_tokens(model, inputs, cache, max_new_tokens)
    texts: list[str] = processor.batch_decode(tokens, skip_special_tokens=True)
    return texts
