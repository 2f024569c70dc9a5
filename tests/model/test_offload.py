"""Models whose weights accelerate brings in only while a module runs."""

import copy

import pytest
import torch
from accelerate import cpu_offload

import models
from mmshiftkv import ShiftKVCache


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_offloaded_weights(model_type):
    model, prompt = models.text_model(model_type), models.prompt_ids()
    expected, cache = ShiftKVCache(model, budget=7), None
    with torch.no_grad():
        logits = model(prompt, past_key_values=expected, use_cache=True).logits
        offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
        cache = ShiftKVCache(offloaded, budget=7)
        found = offloaded(prompt, past_key_values=cache, use_cache=True).logits
    assert next(offloaded.model.layers[0].self_attn.q_proj.parameters()).device.type == "meta"
    torch.testing.assert_close(found, logits)
    for layer in range(3):
        assert cache.kept_indices(layer).equal(expected.kept_indices(layer))


def test_offloaded_weights_are_not_decoded_with_in_fixed_storage():
    offloaded = cpu_offload(models.text_model(), execution_device="cpu")
    with pytest.warns(UserWarning, match="the weights are offloaded, or on several devices"):
        cache = ShiftKVCache(offloaded, budget=7, max_new_tokens=5)
    assert not cache.is_compileable
    with torch.no_grad():
        for tokens in (40, 1, 1):
            offloaded(models.prompt_ids(1, tokens), past_key_values=cache, use_cache=True)
    assert cache.report().tokens_stored == 9
