"""The shapes of everything that `generate` returns, whatever the budget, the storage and the mode.

Scores, logits and hidden states have the shapes that they have with a DynamicCache.  Attention maps are as wide as what
is attended to: the whole prompt while it is prefilled, then what is stored of it, and with fixed storage all slots.
"""

import pytest

import models
from caches import FAMILIES_AND_STORAGES, NEW_TOKENS, STORAGES, dynamic, generate, model_of
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache

TOKENS, BUDGET, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 24, 7, 4, 2, 16, 64, 128
# Mode -> what `generate` is given, rows returned, and rows while decoding, for a batch of two.
MODES = {
    "greedy": ({}, 2, 2),
    "sampling": ({"do_sample": True}, 2, 2),
    "sequences": ({"do_sample": True, "num_return_sequences": 3}, 6, 6),
    "beams": ({"num_beams": 3}, 2, 6),
    "beam-sequences": ({"num_beams": 3, "num_return_sequences": 2}, 4, 6),
}
OUTPUTS = {"output_scores": True, "output_attentions": True, "output_hidden_states": True}


def generated(family, storage, budget, mode):
    model = model_of(family, attention="eager")
    cache = dynamic(model) if budget is None else ShiftKVCache(model, budget=budget, **STORAGES[storage])
    return model, generate(model, cache, models.left_padded([TOKENS, 13]), **OUTPUTS, **MODES[mode][0])


def kinds_of(model):
    """Whether each layer is a full-attention layer."""
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return [kind == "full_attention" for kind in kinds]


CASES = [
    pytest.param(family, storage, budget, mode, id=f"{family}-{storage}-{budget}-{mode}")
    for family, storage in FAMILIES_AND_STORAGES
    for budget in (BUDGET, 1.0)
    for mode in MODES
    if family in ("llama", "gemma3_text") or mode in ("greedy", "beams")
]


@pytest.mark.parametrize(("family", "storage", "budget", "mode"), CASES)
def test_shapes(family, storage, budget, mode):
    model, found = generated(family, storage, budget, mode)
    _, returned, rows = MODES[mode]
    assert found.sequences.shape == (returned, TOKENS + NEW_TOKENS)
    if "beams" in mode:
        assert found.sequences_scores.shape == (returned,)
        assert found.beam_indices.shape == (returned, NEW_TOKENS)
    check_steps(found, rows)
    stored = TOKENS if budget == 1.0 else BUDGET
    check_attentions(model, found, rows, stored, storage)
    check_cache(model, found[CACHE_ARGUMENT], rows, stored, storage)


def check_steps(found, rows):
    """One entry for each new token; the prompt's hidden states are those of the whole prompt."""
    for part in (found.scores, found.logits):
        assert [step.shape for step in part] == [(rows, VOCABULARY)] * NEW_TOKENS
    assert len(found.hidden_states) == NEW_TOKENS
    for step, layers in enumerate(found.hidden_states):
        tokens = TOKENS if step == 0 else 1
        assert [states.shape for states in layers] == [(rows, tokens, HIDDEN)] * 3


def check_attentions(model, found, rows, stored, storage):
    assert len(found.attentions) == NEW_TOKENS
    for step, layers in enumerate(found.attentions):
        for is_full, weights in zip(kinds_of(model), layers, strict=True):
            if step == 0:
                assert weights.shape == (rows, HEADS, TOKENS, TOKENS)
            elif is_full:
                width = stored + (step if storage == "growing" else NEW_TOKENS)
                assert weights.shape == (rows, HEADS, 1, width)
            if is_full and step > 0:
                # Rows of attention sum to one, and what is not written yet is given nothing.
                assert weights.sum(-1).sub(1).abs().max() < 1e-5
                assert weights[..., stored + step :].eq(0).all()


def check_cache(model, cache, rows, stored, storage):
    decoded = NEW_TOKENS - 1
    assert cache.get_seq_length(kinds_of(model).index(True)) == TOKENS + decoded
    for index, is_full in enumerate(kinds_of(model)):
        layer = cache.layers[index]
        assert layer.keys.shape == layer.values.shape
        if is_full:
            slots = stored + (decoded if storage == "growing" else NEW_TOKENS)
            assert layer.keys.shape == (rows, KV_HEADS, slots, HEAD_DIM)
            assert layer.stored == stored + decoded
            assert cache.kept_indices(index).shape == (rows, KV_HEADS, stored)


@pytest.mark.parametrize("mode", MODES)
def test_the_shapes_of_a_covering_budget_are_those_of_a_dynamic_cache(mode):
    found, expected = (generated("llama", "growing", budget, mode)[1] for budget in (1.0, None))
    for part in ("scores", "logits"):
        assert [step.shape for step in found[part]] == [step.shape for step in expected[part]]
    for part in ("hidden_states", "attentions"):
        mine, theirs = ([[each.shape for each in step] for step in output[part]] for output in (found, expected))
        assert mine == theirs
    mine, theirs = ([layer.keys.shape for layer in output[CACHE_ARGUMENT].layers] for output in (found, expected))
    assert mine == theirs


@pytest.mark.parametrize("budget", [BUDGET, 1.0])
@pytest.mark.parametrize("storage", STORAGES)
def test_assisted_decoding_returns_one_entry_for_each_token(storage, budget):
    model = model_of("llama", attention="eager")
    cache = ShiftKVCache(model, budget=budget, **STORAGES[storage])
    ids = models.prompt_ids(1, 8).repeat(1, 3)
    found = generate(model, cache, ids, prompt_lookup_num_tokens=3, **OUTPUTS)
    assert found.sequences.shape == (1, TOKENS + NEW_TOKENS)
    for part in (found.scores, found.logits):
        assert [step.shape for step in part] == [(1, VOCABULARY)] * NEW_TOKENS
    assert len(found.hidden_states) == len(found.attentions) == NEW_TOKENS
    assert [states.shape for states in found.hidden_states[-1]] == [(1, 1, HIDDEN)] * 3
    assert found.attentions[0][0].shape[:2] == (1, HEADS)
