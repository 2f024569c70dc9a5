"""What is said of a model before a prompt."""

import pytest

import models
from families.configs import all_families, tiny_model
from mmshiftkv import ShiftKVCache, model_support

FAMILIES = {family.name: family for family in all_families()}


def build(name):
    if name not in FAMILIES:
        pytest.skip(f"this transformers has no {name}")
    return tiny_model(FAMILIES[name], "eager")


def test_a_plain_model():
    found = model_support(models.text_model())
    assert found.is_supported
    assert found.obstacle_to_compiling is None
    assert [(layer.compressed, layer.queries) for layer in found.layers] == [(True, "rebuilt")] * 3
    assert str(found).splitlines() == [
        "LlamaForCausalLM: supported",
        "decoding is compiled on a GPU with max_new_tokens",
        "layer  cache layer   compressed  queries  notes",
        *(f"{index}      DynamicLayer  yes         rebuilt" for index in range(3)),
    ]


@pytest.mark.parametrize(
    ("name", "queries", "notes"),
    [
        ("phi3", "asked", ()),
        ("deepseek_v3", "asked", ("stores latents",)),
        ("gpt_oss", "rebuilt", ("attention sinks",)),
        ("gemma2", "rebuilt", ("soft-capping at 50.0",)),
        ("cohere2", "asked", ()),
    ],
)
def test_how_queries_and_logits_are_made(name, queries, notes):
    found = model_support(build(name))
    assert found.is_supported
    for layer in found.layers:
        assert (layer.queries, layer.notes) == ((queries, notes) if layer.compressed else ("", ()))
    assert any(layer.compressed for layer in found.layers)


@pytest.mark.parametrize("name", ["diffllama", "mllama", "zaya", "bert"])
def test_a_model_that_is_not_supported(name):
    model = build(name)
    found = model_support(model)
    assert not found.is_supported
    assert "not supported" in str(found).splitlines()[0]
    assert found.obstacle in str(found)
    with pytest.raises(ValueError, match="model: ") as error:
        ShiftKVCache(model, budget=4)
    assert found.obstacle in str(error.value)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model must be a transformers model"):
        model_support("llama")
