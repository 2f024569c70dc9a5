"""A model's decoder is found once, and found anew when the model's parts have changed."""

import copy
import gc
import weakref

import pytest
import torch

import models
from mmshiftkv import ShiftKVCache
from mmshiftkv.model.decoder import Decoder


def decoder_of(model):
    return ShiftKVCache(model, budget=4)._decoder


def test_caches_of_a_model_share_it():
    model = models.text_model("llama")
    assert decoder_of(model) is decoder_of(model)
    assert decoder_of(copy.deepcopy(model)) is not decoder_of(model)


@pytest.mark.parametrize("change", ["attention", "block", "rotary", "config"])
def test_a_changed_model_has_another(change):
    model = models.text_model("llama")
    before, text = decoder_of(model), model.model
    if change == "attention":
        text.layers[1].self_attn = copy.deepcopy(text.layers[1].self_attn)
    elif change == "block":
        text.layers[1] = copy.deepcopy(text.layers[1])
    elif change == "rotary":
        text.rotary_emb = copy.deepcopy(text.rotary_emb)
    else:
        model.config = copy.deepcopy(model.config)
    after = decoder_of(model)
    assert after is not before
    assert after.blocks == tuple(text.layers)
    assert [layer.module for layer in after.attention.values()] == [block.self_attn for block in text.layers]
    assert all(layer.rotary.module is text.rotary_emb for layer in after.attention.values())


def test_other_layers_are_another_matter():
    model = models.text_model("llama")
    assert list(Decoder.of(model, [0]).attention) == [0]
    assert list(Decoder.of(model, [0, 1]).attention) == [0, 1]


def test_it_does_not_keep_the_model():
    model = models.text_model("llama")
    with torch.no_grad():
        model(models.prompt_ids(), past_key_values=ShiftKVCache(model, budget=4), use_cache=True)
    gone = weakref.ref(model), weakref.ref(model.model)
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]
