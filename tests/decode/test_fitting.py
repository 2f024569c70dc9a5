"""Which models are decoded block by block, and what stands in the way of the others."""

import importlib

import pytest
import torch

import models
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache
from mmshiftkv.decode.fitting import _computes_with_number, obstacle_to_blocks


def obstacle(model, change=None, rows=1):
    """Of a model that is changed behind the prompt, where inputs of a step are ready."""
    cache = ShiftKVCache(model, budget=5, max_new_tokens=4)
    ids = models.prompt_ids(rows, 20)
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
    mask = torch.ones(rows, 21, dtype=torch.long)
    inputs = model.prepare_inputs_for_generation(
        torch.cat([ids, ids[:, :1]], dim=1), next_sequence_length=1, attention_mask=mask, **{CACHE_ARGUMENT: cache}
    )
    if change is not None:
        change(model, inputs)
    return obstacle_to_blocks(model, cache, inputs)


def build(name):
    return models.text_model(name.split("-")[0], **models.HYBRIDS.get(name, models.SUPPORTED.get(name)))


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "mixtral", "gemma3_text", "lfm2", "qwen3_next", "gpt_oss"])
def test_nothing(name):
    assert obstacle(build(name)) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma4_text", "not every decoder block has a layer of the cache to itself, in storage that stays"),
        ("llama-dynamic", "rotary factors are computed anew in a step"),
        ("llama-longrope", "rotary factors are computed anew in a step"),
    ],
)
def test_families(name, reason):
    assert obstacle(build(name)) == reason


def no_mask(model, inputs):
    inputs["attention_mask"] = None


def short_mask(model, inputs):
    inputs["attention_mask"] = torch.ones(1, 21)


def training(model, inputs):
    model.model.layers[1].mlp.train()


def hook(model, inputs):
    model.model.layers[1].mlp.register_forward_hook(lambda *args: None)


def own_forward(model, inputs):
    model.model.layers[1].forward = lambda *args, **kwargs: args[0]


def compiled_block(model, inputs):
    model.model.layers[1].compile(backend="eager")


def quantized(model, inputs):
    model.hf_quantizer = object()


def no_one_piece(model, inputs):
    model._can_compile_fullgraph = False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_mask, "the model makes its masks itself"),
        (short_mask, "the model makes its masks itself"),
        (training, "the model is in training mode"),
        (hook, "modules have hooks"),
        (own_forward, "modules have been given another forward"),
        (compiled_block, "modules have been given another forward"),
        (quantized, "the weights are quantized"),
        (no_one_piece, "transformers does not compile the model's step in one piece"),
    ],
)
def test_what_has_been_done_to_a_model(change, reason):
    assert obstacle(build("llama"), change) == reason


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert obstacle(build("llama")) == "autocast is on"


@pytest.mark.parametrize(("family", "computes"), [("llama", False), ("qwen3_next", False), ("gpt2", True)])
def test_code_that_computes_with_the_number_of_a_layer_is_found(family, computes):
    name = f"transformers.models.{family}.modeling_{family}"
    importlib.import_module(name)
    assert _computes_with_number(name) is computes
