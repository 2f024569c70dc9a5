"""What may be around, or in place of, an attention module that is asked for its queries."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

import models
from families.configs import all_families, tiny_model
from mmshiftkv import CACHE_ARGUMENT, ExpectedAttentionCache, ShiftKVCache, SnapKVCache, model_support

FAMILIES = {family.name: family for family in all_families()}
MODELS = ("phi3", "gpt_oss", "deepseek_v3", "llama4_text")
METHODS = [(ShiftKVCache, {}), (SnapKVCache, {"window": 2}), (ExpectedAttentionCache, {})]


def build(name):
    return tiny_model(FAMILIES[name], "eager")


def prefilled(model, cache, ids=None, **inputs):
    """The logits of a prompt, and the tokens that each layer keeps of it."""
    ids = models.prompt_ids(2) if ids is None else ids
    with torch.no_grad():
        logits = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, **inputs).logits
    return logits, [cache.kept_indices(index) for index in range(len(cache.layers))]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert (mine is None and theirs is None) or mine.equal(theirs)


@pytest.mark.parametrize(("make", "settings"), METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_method_under_autocast(name, make, settings):
    model = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, kept = prefilled(model, make(model, budget=6, **settings))
        again, same = prefilled(model, make(model, budget=6, **settings))
    assert logits.equal(again)
    assert any(each is not None and each.shape[-1] == 6 for each in kept)
    assert all(mine is None or mine.equal(theirs) for mine, theirs in zip(kept, same, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_in_chunks_and_in_one(name):
    model, ids = build(name), models.prompt_ids(2)
    expected = prefilled(model, ShiftKVCache(model, budget=6), ids)[1]
    cache = ShiftKVCache(model, budget=6, prefill="chunked", prompt_length=40)
    for chunk in ids.split([17, 22, 1], dim=1):
        found = prefilled(model, cache, chunk)[1]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None and theirs is None) or mine.equal(theirs)


@pytest.mark.parametrize("name", ["phi3", "gpt_oss", "deepseek_v3", "ministral3"])
def test_offloaded_weights(name):
    model = build(name)
    expected = prefilled(model, ShiftKVCache(model, budget=6))
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    cache = ShiftKVCache(offloaded, budget=6)
    assert_same(prefilled(offloaded, cache), expected)
    kinds = {layer.queries for layer in model_support(model).layers}
    assert {layer.queries for layer in model_support(offloaded).layers} == kinds
    # The prompt ends outside of the modules' own passes here.
    late = ShiftKVCache(offloaded, budget=6, prefill="chunked")
    prefilled(offloaded, late)
    late.end_prompt()
    assert_same((expected[0], [late.kept_indices(index) for index in range(len(late.layers))]), expected)
    assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())


def test_a_model_without_weights_is_refused_until_they_are_loaded():
    model = build("phi3").to("meta")
    with pytest.raises(ValueError, match=r"layer 0 .* has no weights yet"):
        ShiftKVCache(model, budget=6)
    model = model.to_empty(device="cpu")
    model.load_state_dict(build("phi3").state_dict())
    for own, theirs in zip(model.buffers(), build("phi3").buffers(), strict=True):
        own.copy_(theirs)
    plain = build("phi3")
    assert_same(prefilled(model, ShiftKVCache(model, budget=6)), prefilled(plain, ShiftKVCache(plain, budget=6)))


class Wrapped(nn.Module):
    """A linear layer with something added, as adapters and quantised layers are: no attribute weight of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.added = nn.Parameter(torch.randn(inner.out_features, inner.in_features) * 0.1)

    def forward(self, states):
        return self.inner(states) + states @ self.added.T


def test_projections_that_are_wrapped():
    for name, projection in (("phi3", "qkv_proj"), ("deepseek_v3", "q_b_proj"), ("llama4_text", "q_proj")):
        torch.manual_seed(0)
        model = build(name)
        plain = prefilled(model, ShiftKVCache(model, budget=6))[1]
        merged = copy.deepcopy(model)
        for block, twin in zip(model.model.layers, merged.model.layers, strict=True):
            wrapped = Wrapped(getattr(block.self_attn, projection))
            setattr(block.self_attn, projection, wrapped)
            with torch.no_grad():
                getattr(twin.self_attn, projection).weight += wrapped.added
        expected = prefilled(merged, ShiftKVCache(merged, budget=6))
        assert_same(prefilled(model, ShiftKVCache(model, budget=6)), expected)
        assert any(mine is not None and not mine.equal(theirs) for mine, theirs in zip(plain, expected[1], strict=True))


def test_lora_on_queries():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    for name, target in (("llama", "q_proj"), ("phi3", "qkv_proj")):
        model = models.text_model() if name == "llama" else build(name)
        config = peft.LoraConfig(target_modules=[target], r=4, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        found = prefilled(adapted, ShiftKVCache(adapted.base_model.model, budget=6))
        merged = adapted.merge_and_unload()
        assert_same(found, prefilled(merged, ShiftKVCache(merged, budget=6)))


@pytest.mark.parametrize("part", ["attention", "block", "model"])
def test_modules_that_their_user_compiled(part):
    model = tiny_model(FAMILIES["phi3"], "eager", num_hidden_layers=2)
    expected = prefilled(model, ShiftKVCache(model, budget=6))
    for block in model.model.layers if part != "model" else [model]:
        (block.self_attn if part == "attention" else block).compile(backend="eager")
    assert_same(prefilled(model, ShiftKVCache(model, budget=6)), expected)


class OwnAttention(LlamaAttention):
    """A user's attention class that computes attention itself."""

    scale = 1.0

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cache = kwargs.get("past_key_values", cache)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, keys, values = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, keys = apply_rotary_pos_emb(query, keys * self.scale, *position_embeddings)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        output = nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=attention_mask, is_causal=attention_mask is None, enable_gqa=True
        )
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


def with_own_attention(attention):
    model = models.text_model()
    for block in model.model.layers:
        block.self_attn.__class__ = attention
    return model


def test_an_attention_class_of_the_users_own():
    """It looks up no attention function: its keys show that its parts are understood."""
    plain = models.text_model()
    own = with_own_attention(type("Own", (OwnAttention,), {"__module__": LlamaAttention.__module__}))
    assert {layer.queries for layer in model_support(own).layers} == {"rebuilt"}
    expected = prefilled(plain, ShiftKVCache(plain, budget=6))
    assert_same(prefilled(own, ShiftKVCache(own, budget=6)), expected)


def test_an_attention_class_of_the_users_own_that_is_not_understood():
    odd = type("Odd", (OwnAttention,), {"__module__": LlamaAttention.__module__, "scale": 2.0})
    with pytest.raises(ValueError, match="looks up no attention function, and its keys are not its k_proj"):
        ShiftKVCache(with_own_attention(odd), budget=6)
