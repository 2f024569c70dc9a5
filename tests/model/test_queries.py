"""What the library knows of a decoder's attention, checked against the queries that the model really uses."""

import threading

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import models
from families.configs import all_families, tiny_model
from mmshiftkv import ShiftKVCache
from mmshiftkv.model.asking import eager_function, takes_query_by_function
from mmshiftkv.model.decoder import Decoder
from mmshiftkv.model.positions import Positions

# By what is special about their queries.
ASKED = {
    "phi3": "fused projection",
    "qwen3_5_text": "gated queries, a quarter of each head rotated, linear-attention layers",
    "cohere2": "full-attention layers without rotation, features paired side by side in the others",
    "deepseek_v3": "latents",
    "jetmoe": "experts of queries, stored heads repeated one after another",
    "llama4_text": "complex factors, layers without rotation whose queries grow with the position",
    "ministral3": "queries that grow with the position",
    "gemma4_text": "shared KV layers",
    "gptj": "sin before cos, from a table",
    "gpt2": "learned positions",
    "hunyuan_v1_dense": "norms behind the rotation",
}
FAMILIES = {family.name: family for family in all_families()}


def build(name: str, **changes):
    if name in ASKED:
        if name not in FAMILIES:
            pytest.skip(f"this transformers has no {name}")
        model = tiny_model(FAMILIES[name], "eager", **changes)
        if name == "gptj" and not takes_query_by_function(model.transformer.h[0].attn):
            pytest.skip("this transformers computes the attention of GPT-J apart")
        return model
    return models.text_model(name.split("-")[0], attention="eager", **{**models.SUPPORTED[name], **changes})


class Observed:
    """What the full-attention layers of a model see and make of a prompt.

    Attributes:
        layers: AttentionLayer by index.
        hidden_states, positions: what each is given.
        queries, keys, values: what each hands to its attention function.
    """

    def __init__(self, model, ids, **inputs):
        selecting = ShiftKVCache(model, budget=1).layers
        chosen = [index for index, layer in enumerate(selecting) if type(layer).__name__ == "GrowingLayer"]
        self.layers = Decoder(model, chosen).attention
        self.hidden_states, self.positions, self.queries, self.keys, self.values = {}, {}, {}, {}, {}
        cache = DynamicCache(config=model.config)
        handles = [
            layer.module.register_forward_pre_hook(self._keep(layer, cache), with_kwargs=True)
            for layer in self.layers.values()
        ]
        AttentionInterface.register("recording", self._record)
        AttentionMaskInterface.register("recording", eager_mask)
        model.set_attn_implementation("recording")
        with torch.no_grad():
            model(ids, use_cache=True, past_key_values=cache, **inputs)
        model.set_attn_implementation("eager")
        for handle in handles:
            handle.remove()
        self.stored = {index: (cache.layers[index].keys, cache.layers[index].values) for index in self.layers}

    def _keep(self, layer, cache):
        def hook(module, args, kwargs):
            given = {**dict(zip(layer.parameters, args, strict=False)), **kwargs}
            self.hidden_states[layer.index] = given["hidden_states"]
            self.positions[layer.index] = layer.positions_of(given["hidden_states"], given, cache)

        return hook

    def _record(self, module, query, keys, values, mask, **kwargs):
        index = module.layer_idx
        self.queries[index], self.keys[index], self.values[index] = query, keys, values
        return eager_function(module)(module, query, keys, values, mask, **kwargs)


@pytest.mark.parametrize("name", [*models.SUPPORTED, *ASKED])
def test_queries_are_those_the_model_makes(name):
    seen = Observed(build(name), models.prompt_ids(2, 24))
    assert seen.layers
    for index, layer in seen.layers.items():
        with torch.no_grad():
            queries = layer.queries(seen.hidden_states[index], seen.positions[index])
            unrotated = layer.unrotated(seen.hidden_states[index], seen.positions[index])
            rotated = layer.rotate(unrotated, seen.positions[index].factors)
        if name in ASKED:
            assert not layer.facts.is_rebuilt
            assert queries.equal(seen.queries[index])
        else:
            assert layer.facts.is_rebuilt
            torch.testing.assert_close(queries, seen.queries[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rotated, seen.queries[index], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("name", [*models.SUPPORTED, *ASKED])
def test_queries_ahead_are_those_of_later_tokens(name, stride):
    # Longer texts change the frequencies of a dynamic embedding; here they do not.
    changes = {"max_position_embeddings": 512} if name == "llama-dynamic" else {}
    seen = Observed(build(name, **changes), models.prompt_ids(2, 24))
    last, later = slice(9, 10), slice(9 + stride, 10 + 4 * stride, stride)
    for index, layer in seen.layers.items():
        hidden = seen.hidden_states[index]
        # Two groups at the same four positions, and the token before them.
        made_up = torch.cat([hidden[:, later], hidden[:, later], hidden[:, last]], dim=1)
        with torch.no_grad():
            ahead, own = layer.queries_ahead(
                made_up, seen.positions[index].tokens(9, 10), count=4, stride=stride, backend="torch"
            ).rotated()
        expected = seen.queries[index]
        torch.testing.assert_close(ahead, torch.cat([expected[:, :, later]] * 2, dim=2), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own, expected[:, :, last], atol=1e-5, rtol=1e-5)


def test_queries_grow_with_the_position_in_layers_made_so():
    """Of Llama 4 the layers without rotation, of Ministral 3 all; far from the prompt, where it can be seen."""
    for name in ("llama4_text", "ministral3"):
        model = build(name)
        seen = Observed(model, models.prompt_ids(1, 8))
        grew = []
        for index, layer in seen.layers.items():
            hidden, last = seen.hidden_states[index], seen.positions[index].tokens(-1)
            with torch.no_grad():
                far, own = layer.queries_ahead(
                    hidden[:, [-1, -1]], last, count=1, stride=300_000, backend="torch"
                ).rotated()
            grew.append((far.norm() / own.norm()).item())
        assert max(grew) > 1.05


@pytest.mark.parametrize("name", models.SUPPORTED)
def test_asked_and_rebuilt_queries_are_the_same(name):
    seen = Observed(build(name), models.prompt_ids(2, 24))
    for index, layer in seen.layers.items():
        hidden, last = seen.hidden_states[index][:, :13], seen.positions[index].tokens(9, 10)
        with torch.no_grad():
            rebuilt, asked = (
                each.queries_ahead(hidden, last, count=4, stride=3, backend="torch").rotated()
                for each in (layer, layer.asking())
            )
        torch.testing.assert_close(asked, rebuilt, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v3", "jetmoe", "phi3"])
def test_attended_keys_and_values_are_those_that_attention_makes(name):
    seen = Observed(build(name), models.prompt_ids(2, 24))
    for index, layer in seen.layers.items():
        with torch.no_grad():
            keys, values = layer.attended(*seen.stored[index])
        torch.testing.assert_close(keys, seen.keys[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, seen.values[index], atol=1e-5, rtol=1e-5)
        heads = seen.stored[index][0].shape[1]
        assert layer.facts.is_latent == (name != "phi3")
        of_heads = torch.arange(keys.shape[1]).float().view(1, -1, 1)
        stored = layer.of_stored(of_heads, heads)
        if name == "jetmoe":  # heads 0 and 2 are made of the first
            assert stored.flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", ["llama", *ASKED])
def test_looking_and_asking_leave_nothing_behind(name):
    model = build(name)
    functions, implementation = set(ALL_ATTENTION_FUNCTIONS), model.config._attn_implementation
    before = {key: set(vars(module)) for key, module in model.named_modules()}
    cache = ShiftKVCache(model, budget=6)
    with torch.no_grad():
        model(models.prompt_ids(), past_key_values=cache, use_cache=True)
    assert models.hooks_on(model) == 0
    assert set(ALL_ATTENTION_FUNCTIONS) == functions
    assert model.config._attn_implementation == implementation
    assert {key: set(vars(module)) for key, module in model.named_modules()} == before


def test_a_model_that_is_asked_can_run_in_other_threads():
    model, ids = build("phi3"), models.prompt_ids()
    with torch.no_grad():
        expected = model(ids).logits
        wrong, is_over = [], threading.Event()

        def run():
            with torch.no_grad():
                while not is_over.is_set():
                    wrong.append(not model(ids).logits.equal(expected))

        thread = threading.Thread(target=run)
        thread.start()
        caches = [ShiftKVCache(model, budget=6) for _ in range(8)]
        for cache in caches:
            model(ids, past_key_values=cache, use_cache=True)
        is_over.set()
        thread.join()
    assert wrong
    assert not any(wrong)
    assert all(cache.kept_indices(0).equal(caches[0].kept_indices(0)) for cache in caches)


def test_which_queries_are_rotated_by_the_fused_kernel():
    for name in models.SUPPORTED:
        for layer in Observed(build(name), models.prompt_ids(1, 4)).layers.values():
            turns = getattr(layer.module, "use_rope", True)
            assert layer.facts.pairs_halves == (turns and name not in ("cohere", "glm", "helium"))


def test_multimodal_positions_advance_on_all_axes(vision_case):
    case = vision_case("qwen2_5_vl")
    inputs = case.prompts()
    rotary = Decoder(case.model, [0]).attention[0].rotary
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
    found = rotary.ahead(Positions(rotary.module(x, here)), count=4, stride=7).factors
    expected = rotary.module(x, here + torch.arange(1, 5) * 7)
    torch.testing.assert_close(found, tuple(expected), atol=1e-5, rtol=0)


def test_looking_ahead_leaves_a_dynamic_embedding_as_it_is():
    model = build("llama-dynamic")
    seen = Observed(model, models.prompt_ids(1, 40))
    rotary = model.model.rotary_emb
    before = rotary.inv_freq.clone(), rotary.max_seq_len_cached, rotary.rope_type
    seen.layers[0].rotary.ahead(seen.positions[0].tokens(-1), count=4, stride=100)
    assert rotary.inv_freq.equal(before[0])
    assert (rotary.max_seq_len_cached, rotary.rope_type) == before[1:]


def test_a_changed_embedding_is_looked_at_anew():
    model = build("llama")
    seen = Observed(model, models.prompt_ids(1, 10))
    last, layer, rotary = seen.positions[0].tokens(-1), seen.layers[0], model.model.rotary_emb
    before, expected = (layer.rotary.ahead(last, count=4, stride=stride).factors for stride in (6, 3))
    rotary.inv_freq = rotary.inv_freq * 0.5
    found = layer.rotary.ahead(last, count=4, stride=6).factors
    assert not torch.allclose(found[0], before[0], atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# family -> what the error says
REFUSED = {
    "doge": "it adds a term of its own to the logits",
    "diffllama": "differential attention",
    "beam": "attention_scaling",
    "mllama": "cross_attention_states",
    "bloom": "alibi",
    "gpt_neo": "none of its modules attends to tokens",
    "zaya": "no full-attention layer that holds nothing else .its cache layers: LinearAttentionAndFullAttentionLayer",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_queries_or_logits_are_not_understood_is_refused(name):
    if name not in FAMILIES:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(ValueError, match=REFUSED[name]):
        ShiftKVCache(tiny_model(FAMILIES[name], "eager"), budget=4)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_large_logits_in_16_bits_are_no_reason_to_refuse(name, dtype):
    model = models.text_model(name, attention="eager", hidden_size=256, num_attention_heads=8, head_dim=64)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 20
        layer.self_attn.k_proj.weight.data *= 20
    layers = Decoder(model.to(dtype), [0]).attention
    assert layers[0].facts.is_rebuilt
    assert layers[0].facts.pairs_halves


def layer_and_position(name="qwen3"):
    model = models.text_model(name)
    layer = Decoder(model, [0, 1]).attention[1]
    cos, sin = torch.ones(1, 1, layer.module.head_dim), torch.zeros(1, 1, layer.module.head_dim)
    return layer, Positions((cos, sin))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "olmo2"])
def test_what_queries_ahead_are_made_of_is_known(name):
    """All that is read, by the module's own tensors: what can be changed without being named changes no query."""
    layer, last = layer_and_position(name)
    tensors, others = layer.read_ahead(last, count=4, stride=2)
    parts = [layer.module.q_proj, *([layer.module.q_norm] if hasattr(layer.module, "q_norm") else [])]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    assert {id(tensor) for tensor in tensors} >= {id(tensor) for tensor in (*last.factors, *parameters)}
    hash(others)
    states = torch.randn(1, 5, layer.module.q_proj.in_features)

    def queries():
        with torch.no_grad():
            return layer.queries_ahead(states, last, count=4, stride=2, backend="torch").rotated()[0]

    expected, named = queries(), {id(parameter) for parameter in parameters}
    for parameter in layer.module.parameters():
        if id(parameter) not in named:
            parameter.data.normal_()
    assert queries().equal(expected)


class OtherNorm(torch.nn.RMSNorm):
    """A norm of another package."""

    def forward(self, states):
        return super().forward(states)


@pytest.mark.parametrize(
    "change",
    ["subclass", "hook", "pre-hook", "forward", "offloaded", "a norm of parts", "another norm", "a class's forward"],
)
def test_of_modules_with_code_of_their_own_nothing_is_said(change, monkeypatch):
    layer, last = layer_and_position()
    assert layer.read_ahead(last, count=4, stride=2) is not None
    projection = layer.module.q_proj
    if change == "subclass":
        projection.__class__ = type("Adapted", (torch.nn.Linear,), {})
    elif change == "hook":
        projection.register_forward_hook(lambda *_: None)
    elif change == "pre-hook":
        projection.register_forward_pre_hook(lambda *_: None)
    elif change == "forward":
        projection.forward = lambda states: states
    elif change == "offloaded":
        projection._hf_hook = object()
    elif change == "a norm of parts":
        layer.module.q_norm = torch.nn.Sequential(layer.module.q_norm)
    elif change == "another norm":
        layer.module.q_norm = OtherNorm(layer.module.head_dim)
    else:
        monkeypatch.setattr(type(layer.module.q_norm), "forward", OtherNorm.forward)
    assert layer.read_ahead(last, count=4, stride=2) is None
