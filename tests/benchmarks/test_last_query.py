"""The last prompt token's query counting for more or for less than published."""

import numpy as np
import pytest
import torch

import models
from benchmarks.quality.last_query import WeightedLastQuery, raise_highest, tokens_set_aside
from mmshiftkv import CACHE_ARGUMENT, Method, PrefillSelectionCache, ShiftKVConfig
from mmshiftkv.methods.shiftkv import ShiftKV
from shiftkv_kernels import keep_best

SETTINGS = {"num_proxies": 64, "num_groups": 8}


def stated(score, mass, valid, count, aside):
    """What one row of one KV head keeps: the last token, the `aside` with the most mass, then the best scores."""
    others = [token for token in range(len(score) - 1) if valid[token]]
    first = sorted(others, key=lambda token: (-mass[token], token))[:aside]
    rest = sorted((token for token in others if token not in first), key=lambda token: (-score[token], token))
    kept = [*first, *rest][: count - 1]
    padding = [token for token in range(len(score)) if not valid[token]]
    missing = count - 1 - len(kept)
    return sorted([*kept, *padding[len(padding) - missing :], len(score) - 1])


def problem(tokens, padding, *, tied=False, seed=0):
    """Scores and last-query mass (2, 3, tokens) as the method makes them, and a mask that pads the second row."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, 3, tokens, generator=generator) ** 4
    mass = (mass * 20).round() / 1024 if tied else mass / mass.sum(-1, keepdim=True)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, :padding] = False
    mass = mass * valid[:, None]
    mass[..., -1] = 0
    return torch.randint(0, 9, mass.shape, generator=generator) * valid[:, None] + mass, mass, valid


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tokens", "padding"), [(50, 0), (50, 13), (50, 45), (2, 1), (2, 0)])
@pytest.mark.parametrize("share", [0.125, 0.29, 0.5, 0.999])
def test_the_kept_are_those_of_the_statement(tokens, padding, share, tied):
    scores, mass, valid = problem(tokens, padding, tied=tied)
    for count in sorted({1, 2, 12, tokens - 1} & set(range(1, tokens))):
        aside = int(share * count + 1e-9)
        raised = raise_highest(scores, mass, aside, 9, valid)
        found = keep_best(raised, count, valid, backend="torch")
        for row, head in np.ndindex(2, 3):
            expected = stated(scores[row, head].tolist(), mass[row, head].tolist(), valid[row], count, aside)
            assert found[row, head].tolist() == expected
        assert raised[~valid[:, None].expand_as(raised)].equal(scores[~valid[:, None].expand_as(raised)])
        assert raised[..., -1].equal(scores[..., -1])
        if not padding:
            assert raise_highest(scores, mass, aside, 9).equal(raised)


def test_places_are_counted_as_the_decimal_number_says():
    assert [tokens_set_aside(share, 100) for share in (0, 0.0, 0.07, 0.29, 0.57, 1e-9, 0.999)] == [
        0,
        0,
        7,
        29,
        57,
        0,
        99,
    ]
    assert [tokens_set_aside(0.25, count) for count in (1, 3, 4, 7, 64)] == [0, 0, 1, 1, 16]
    assert all(tokens_set_aside(1 - 2**-53, count) < count for count in (1, 2, 4096, 10**6))


class Watched(Method):
    """A method that notes, for each layer in turn, the last query's mass and the scores."""

    def __init__(self, method):
        self._method = method
        self.seen = []

    def observe(self, layer, inputs, earlier):
        return self._method.observe(layer, inputs, earlier)

    def prepare(self, layer, summary, valid):
        return self._method.prepare(layer, summary, valid)

    def score(self, layer, summary, keys, values, valid):
        scores = self._method.score(layer, summary, keys, values, valid)
        _, last_mass = self._method.attention_mass(layer, summary, keys, valid)
        self.seen.append((last_mass, scores))
        return scores


def prefilled(model, inputs, method):
    """A cache of the method after the prompts, and what was noted of each layer."""
    watched = Watched(method)
    cache = PrefillSelectionCache(model, watched, method.config.budget)
    with torch.no_grad():
        model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)
    return cache, watched.seen


def scores_of(method):
    """The scores that a method gives in each layer of a small model."""
    _, seen = prefilled(models.text_model(), {"input_ids": models.prompt_ids()}, method)
    return [scores for _, scores in seen]


def test_a_last_query_of_weight_one_is_the_published_one():
    config = ShiftKVConfig(budget=8, **SETTINGS)
    published = scores_of(ShiftKV(config))
    for found, expected in zip(scores_of(WeightedLastQuery(config)), published, strict=True):
        assert found.equal(expected)
    for found, expected in zip(scores_of(WeightedLastQuery(config, 1, 0)), published, strict=True):
        assert found.equal(expected.floor())
    without = scores_of(WeightedLastQuery(config, 0, 1))
    assert any(not found.equal(expected) for found, expected in zip(without, published, strict=True))


@pytest.mark.parametrize(("budget", "kept"), [(12, 12), (0.3, 12)])
@pytest.mark.parametrize("lengths", [[40], [40, 30, 5]])
def test_a_cache_keeps_those_that_have_places_set_aside(lengths, budget, kept):
    model, inputs = models.text_model(), models.left_padded(lengths)
    valid = inputs["attention_mask"].bool()
    config = ShiftKVConfig(budget=budget, **SETTINGS)
    published, seen = prefilled(model, inputs, ShiftKV(config))
    cache, _ = prefilled(model, inputs, WeightedLastQuery(config, last_query_share=0.25))
    for index, (last_mass, scores) in enumerate(seen):
        found = cache.kept_indices(index)
        assert found.shape[-1] == kept
        for row, head in np.ndindex(len(lengths), 2):
            score, mass = scores[row, head].tolist(), last_mass[row, head].tolist()
            assert found[row, head].tolist() == stated(score, mass, valid[row], kept, 3)
    assert any(not cache.kept_indices(i).equal(published.kept_indices(i)) for i in range(3))


def test_rows_keep_what_they_keep_alone():
    model, inputs = models.text_model(), models.left_padded([40, 30])
    method = WeightedLastQuery(ShiftKVConfig(budget=12, **SETTINGS), last_query_share=0.5)
    together, _ = prefilled(model, inputs, method)
    alone, _ = prefilled(model, {"input_ids": inputs["input_ids"][1:, 10:]}, method)
    for layer in range(3):
        assert (together.kept_indices(layer)[1] - 10).equal(alone.kept_indices(layer)[0])


def test_chunks_keep_what_one_piece_keeps():
    model, inputs = models.text_model(), {"input_ids": models.prompt_ids()}
    method = WeightedLastQuery(ShiftKVConfig(budget=12, **SETTINGS), last_query_share=0.25)
    whole, _ = prefilled(model, inputs, method)
    chunked = PrefillSelectionCache(model, method, 12, prefill="chunked", prompt_length=40)
    with torch.no_grad():
        for part in inputs["input_ids"].split(16, dim=1):
            model(part, **{CACHE_ARGUMENT: chunked}, use_cache=True)
    assert all(whole.kept_indices(layer).equal(chunked.kept_indices(layer)) for layer in range(3))


@pytest.mark.parametrize("share", [0, 0.0, 0.08])
def test_no_place_set_aside_leaves_the_published_scores(share):
    model, inputs = models.text_model(), models.left_padded([40, 30])
    config = ShiftKVConfig(budget=12, **SETTINGS)
    published, before = prefilled(model, inputs, ShiftKV(config))
    cache, seen = prefilled(model, inputs, WeightedLastQuery(config, last_query_share=share))
    assert all(found.equal(expected) for (_, found), (_, expected) in zip(seen, before, strict=True))
    assert all(cache.kept_indices(i).equal(published.kept_indices(i)) for i in range(3))


def test_layers_with_the_last_tokens_proxies_set_places_aside_too():
    config = ShiftKVConfig(budget=12, last_token_layers=3, **SETTINGS)
    method = WeightedLastQuery(config, last_query_share=0.5)
    cache, seen = prefilled(models.text_model(), models.left_padded([40]), method)
    for index, (last_mass, _) in enumerate(seen):
        highest = last_mass[..., :-1].topk(6).indices
        found = cache.kept_indices(index)
        assert (highest.unsqueeze(-1) == found.unsqueeze(-2)).any(-1).all()


@pytest.mark.gpu
@models.requires_gpu
def test_the_gpu_agrees_and_repeats():
    scores, mass, valid = (part.cuda() for part in problem(4097, 1000, tied=True))
    raised = raise_highest(scores, mass, 512, 9, valid)
    assert raised.cpu().equal(raise_highest(scores.cpu(), mass.cpu(), 512, 9, valid.cpu()))
    assert raised.equal(raise_highest(scores, mass, 512, 9, valid))
