"""One prompt from its first token to its selection: passes, interrupts, and what a method may do to it."""

from dataclasses import dataclass

import pytest
import torch

import models
from mmshiftkv import Method, PrefillSelectionCache, ShiftKVCache
from mmshiftkv.methods.snapkv import SnapKV


def prefill(model, cache, ids, **inputs):
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, **inputs)
    return cache


@dataclass(frozen=True)
class Latest(Method):
    """Scores a token by its number; answers as `answer` says."""

    answer: object = None

    def observe(self, layer, inputs, earlier):
        return None

    def score(self, layer, summary, keys, values, valid):
        scores = torch.arange(keys.shape[2]).float().expand(keys.shape[:3])
        return scores if self.answer is None else self.answer(scores)


@dataclass(frozen=True)
class Refitted(Latest):
    """Gives the kept tokens other values."""

    change: object = None

    def refit(self, layer, summary, keys, values, kept, valid):
        index = kept[..., None].expand(-1, -1, -1, values.shape[3])
        return self.change(values.gather(2, index))


@pytest.fixture(scope="module")
def model():
    return models.text_model()


def test_an_interrupt_in_a_later_chunk_is_not_passed_over(model):
    cache = ShiftKVCache(model, budget=4, prefill="chunked")
    prefill(model, cache, models.prompt_ids(1, 16))

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prefill(model, cache, models.prompt_ids(1, 16))
    handle.remove()
    for tokens in (16, 1):
        with pytest.raises(ValueError, match=r"interrupted; call reset\(\)"):
            prefill(model, cache, models.prompt_ids(1, tokens))
    cache.reset()
    assert prefill(model, cache, models.prompt_ids()).get_seq_length() == 40
    assert models.hooks_on(model) == 0


@pytest.mark.parametrize("reserved", [None, 4])
@pytest.mark.parametrize("tokens", [40, 3])
def test_refitted_values_take_the_place_of_the_kept_ones(model, reserved, tokens):
    plain = prefill(
        model, PrefillSelectionCache(model, Latest(), 5, max_new_tokens=reserved), models.prompt_ids(2, tokens)
    )
    method = Refitted(change=lambda values: 2 * values)
    cache = PrefillSelectionCache(model, method, 5, max_new_tokens=reserved)
    prefill(model, cache, models.prompt_ids(2, tokens))
    factor = 1 if tokens <= 5 else 2  # a prompt that fits is kept as it is
    for mine, theirs in zip(cache.layers, plain.layers, strict=True):
        assert mine.keys.equal(theirs.keys)
        assert mine.values.equal(factor * theirs.values)


def test_refitted_values_in_chunks(model):
    method = Refitted(change=lambda values: 2 * values)
    single = prefill(model, PrefillSelectionCache(model, method, 5), models.prompt_ids())
    cache = PrefillSelectionCache(model, method, 5, prefill="chunked", prompt_length=40)
    for part in models.prompt_ids().split(16, dim=1):
        prefill(model, cache, part)
    for mine, theirs in zip(cache.layers, single.layers, strict=True):
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("snapkv", "method='snapkv' must be an object of a class that inherits from mmshiftkv.Method"),
        (SnapKV, r"method=SnapKV is a class; give an object of it: SnapKV\(...\)"),
        (None, "method=None must be an object"),
    ],
)
def test_what_is_no_method_is_refused_when_the_cache_is_built(model, method, message):
    with pytest.raises(TypeError, match=message):
        PrefillSelectionCache(model, method, 4)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda scores: scores[:, 0],
            r"Latest.score returned torch.float32 \(2, 40\) on cpu, must",
        ),
        (
            lambda scores: scores.double(),
            r"torch.float64 \(2, 2, 40\) .* \(B, H_kv, T\) = \(2, 2, 40\) on cpu",
        ),
        (lambda scores: scores[..., :-1], r"returned torch.float32 \(2, 2, 39\) on cpu, must"),
        (lambda scores: None if scores is None else [1.0], "Latest.score returned a list, must return a tensor"),
    ],
)
def test_wrong_scores_are_refused_with_the_methods_name(model, answer, message):
    cache = PrefillSelectionCache(model, Latest(answer), 4)
    with pytest.raises((TypeError, ValueError), match=message):
        prefill(model, cache, models.prompt_ids(2))
    assert cache.get_seq_length() == 0
    assert models.hooks_on(model) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values[..., :-1], r"Refitted.refit returned torch.float32 \(1, 2, 4, 15\) on cpu, must return"),
        (lambda values: values.double(), r"must return torch.float32 \(B, H_kv, C, D_v\) = \(1, 2, 4, 16\) on cpu"),
        (lambda values: 3, "Refitted.refit returned a int, must return a tensor or None"),
    ],
)
def test_wrong_values_are_refused_with_the_methods_name(model, change, message):
    cache = PrefillSelectionCache(model, Refitted(change=change), 4)
    with pytest.raises((TypeError, ValueError), match=message):
        prefill(model, cache, models.prompt_ids())
    assert cache.get_seq_length() == 0


def test_a_budget_below_what_a_method_protects_is_refused(model):
    assert Latest().protected == 1
    with pytest.raises(ValueError, match=r"budget=3 must be at least 8: SnapKV\(window=8"):
        PrefillSelectionCache(model, SnapKV(window=8), 3)
