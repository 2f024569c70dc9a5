"""What the library knows of a decoder's attention, checked against the queries that the model really uses."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import models
from mmshiftkv import ShiftKVCache
from mmshiftkv.model.decoder import Decoder


def build(name: str, **changes):
    return models.text_model(name.split("-")[0], **{**models.SUPPORTED[name], **changes})


def recorded_queries(model, **inputs):
    """The queries that each layer's attention function is given, by layer."""
    seen = {}

    def record(module, query, key, value, mask, **kwargs):
        seen[module.layer_idx] = query
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("recording_queries", record)
    AttentionMaskInterface.register("recording_queries", sdpa_mask)
    model.set_attn_implementation("recording_queries")
    with torch.no_grad():
        model(**inputs)
    model.set_attn_implementation("sdpa")
    return seen


def observed(model, ids):
    """The decoder, and what each of its layers is given: (hidden_states, cos, sin)."""
    layers = [
        i for i, layer in enumerate(ShiftKVCache(model, budget=1).layers) if type(layer).__name__ == "GrowingLayer"
    ]
    decoder, inputs, handles = Decoder(model, layers), {}, []
    for index, layer in decoder.attention.items():

        def keep(module, args, kwargs, index=index):
            inputs[index] = kwargs["hidden_states"], *kwargs["position_embeddings"]

        handles.append(layer.module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return decoder, inputs


@pytest.mark.parametrize("name", models.SUPPORTED)
def test_queries_are_those_the_model_makes(name):
    model, ids = build(name), models.prompt_ids(2, 24)
    expected = recorded_queries(model, input_ids=ids)
    decoder, inputs = observed(model, ids)
    assert decoder.attention
    for index, layer in decoder.attention.items():
        hidden, cos, sin = inputs[index]
        with torch.no_grad():
            queries = layer.rotate(layer.project_queries(hidden), cos, sin)
        torch.testing.assert_close(queries, expected[index], atol=1e-5, rtol=1e-5)
        assert layer.scaling == layer.module.scaling


@pytest.mark.parametrize("name", models.SUPPORTED)
def test_future_positions_are_those_the_model_would_use(name):
    # Longer texts change the frequencies of a dynamic embedding; here they do not.
    changes = {"max_position_embeddings": 512} if name == "llama-dynamic" else {}
    model, ids = build(name, **changes), models.prompt_ids(1, 24)
    decoder, inputs = observed(model, ids[:, :10])
    _, later = observed(model, ids)
    for index, layer in decoder.attention.items():
        _, cos, sin = inputs[index]
        future_cos, future_sin = layer.advance(cos[:, -1:], sin[:, -1:], count=4, stride=3)
        _, all_cos, all_sin = later[index]
        torch.testing.assert_close(future_cos, all_cos[:, 12:22:3], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(future_sin, all_sin[:, 12:22:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", models.SUPPORTED)
def test_proxies_are_rotated_as_the_model_rotates(name):
    decoder, inputs = observed(build(name), models.prompt_ids(2, 10))
    for index, layer in decoder.attention.items():
        _, cos, sin = (part[:, -1:] for part in inputs[index])
        heads, dim = layer.module.config.num_attention_heads, layer.head_dim
        proxies, last = (torch.randn(2, heads, count, dim) for count in (12, 1))
        found = layer.rotate_ahead(proxies, last, cos, sin, count=4, stride=3, backend="torch")
        later_cos, later_sin = layer.advance(cos, sin, count=4, stride=3)
        expected = [layer.rotate(group, later_cos, later_sin) for group in proxies.split(4, dim=2)]
        torch.testing.assert_close(found[0], torch.cat(expected, dim=2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], layer.rotate(last, cos, sin), atol=1e-5, rtol=1e-5)
        turns = getattr(layer.module, "use_rope", True)
        assert layer._pairs_halves == (turns and name not in ("cohere", "glm", "helium"))


def test_multimodal_positions_advance_on_all_axes(vision_case):
    case = vision_case("qwen2_5_vl")
    inputs = case.prompts()
    decoder = Decoder(case.model, [0])
    rotary = case.model.model.language_model.rotary_emb
    positions, _ = case.model.model.get_rope_index(
        inputs["input_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
    )
    image_token = (inputs["input_ids"][0] == case.model.config.image_token_id).nonzero()[5].item()
    here = positions[:, :, image_token : image_token + 1]
    assert len(set(here.flatten().tolist())) > 1
    x = torch.zeros(1)
    steps = torch.arange(1, 5) * 7
    cos, sin = decoder.attention[0].advance(*rotary(x, here), count=4, stride=7)
    expected_cos, expected_sin = rotary(x, here + steps)
    torch.testing.assert_close(cos, expected_cos, atol=1e-5, rtol=0)
    torch.testing.assert_close(sin, expected_sin, atol=1e-5, rtol=0)


def test_looking_ahead_leaves_a_dynamic_embedding_as_it_is():
    model = build("llama-dynamic")
    decoder, inputs = observed(model, models.prompt_ids(1, 40))
    rotary = model.model.rotary_emb
    before = rotary.inv_freq.clone(), rotary.max_seq_len_cached, rotary.rope_type
    layer = decoder.attention[0]
    layer.advance(inputs[0][1][:, -1:], inputs[0][2][:, -1:], count=4, stride=100)
    assert rotary.inv_freq.equal(before[0])
    assert (rotary.max_seq_len_cached, rotary.rope_type) == before[1:]


def test_a_changed_embedding_is_looked_at_anew():
    model = build("llama")
    decoder, inputs = observed(model, models.prompt_ids(1, 10))
    _, cos, sin = (part[:, -1:] for part in inputs[0])
    layer, rotary = decoder.attention[0], model.model.rotary_emb
    before, expected = (layer.advance(cos, sin, count=4, stride=stride) for stride in (6, 3))
    rotary.inv_freq = rotary.inv_freq * 0.5
    found = layer.advance(cos, sin, count=4, stride=6)
    assert not torch.allclose(found[0], before[0], atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# name -> (config changes, what the error says)
REFUSED = {
    "phi3": ({}, "q_proj"),
    "gpt2": ({"n_embd": 64, "n_head": 4, "n_layer": 2}, "no module list 'layers'"),
    "cohere2": ({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "layer 1"),
    "qwen3_next": (
        {
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        "q_proj gives 8 heads",
    ),
    "phi": ({}, "layer 0"),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 64, "do_layer_norm_before": True}, "rotary_emb"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_queries_are_not_understood_is_refused(name):
    changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        ShiftKVCache(models.text_model(name, attention="eager", **changes), budget=4)


def test_a_model_with_sliding_layers_only_is_refused():
    with pytest.raises(ValueError, match="no full-attention layer"):
        ShiftKVCache(models.text_model("mistral", sliding_window=8), budget=4)


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    with pytest.raises(ValueError, match="encoder-decoder"):
        ShiftKVCache(model, budget=4)


@pytest.mark.parametrize("model", [None, "llama", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="model must be a transformers model"):
        ShiftKVCache(model, budget=4)
