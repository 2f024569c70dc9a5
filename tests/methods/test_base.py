"""The protocol between a cache and a method, with the method that CONTRIBUTING.md shows."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import models
from mmshiftkv import Method, PrefillSelectionCache

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@dataclass(frozen=True)
class Recorder(Method):
    """Scores tokens by their number, and keeps what it was asked."""

    observed: list
    scored: list

    def observe(self, layer, observation, earlier):
        self.observed.append((observation.hidden_states.shape[1], earlier))
        return (earlier or 0) + observation.hidden_states.shape[1]

    def score(self, layer, summary, keys, values, valid):
        self.scored.append((layer.index, summary, keys.shape, values.shape, valid))
        return torch.arange(keys.shape[2]).float().expand(keys.shape[:3])


def prefill(model, cache, ids, chunk=None, **inputs):
    with torch.no_grad():
        for part in ids.split(chunk or ids.shape[1], dim=1):
            model(part, past_key_values=cache, use_cache=True, **inputs)


def test_a_prompt_is_shown_once_and_scored_once_per_layer():
    model = models.text_model()
    method = Recorder([], [])
    cache = PrefillSelectionCache(model, method, budget=5)
    inputs = models.left_padded([40, 30])
    prefill(model, cache, inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert method.observed == [(40, None)] * 3
    assert [entry[:4] for entry in method.scored] == [(i, 40, (2, 2, 40, 16), (2, 2, 40, 16)) for i in range(3)]
    assert all(entry[4].equal(inputs["attention_mask"].bool()) for entry in method.scored)
    assert cache.kept_indices(0)[0, 0].tolist() == [35, 36, 37, 38, 39]


def test_a_prompt_in_chunks_is_shown_piece_by_piece():
    model = models.text_model()
    method = Recorder([], [])
    cache = PrefillSelectionCache(model, method, budget=5, prefill="chunked", prompt_length=40)
    prefill(model, cache, models.prompt_ids(), chunk=16)
    assert method.observed == [(16, None)] * 3 + [(16, 16)] * 3 + [(8, 32)] * 3
    assert [entry[:2] for entry in method.scored] == [(0, 40), (1, 40), (2, 40)]
    assert all(entry[4] is None for entry in method.scored)


@dataclass(frozen=True)
class Prepared(Recorder):
    """Prepares once for scores and refit, and keeps what all of them were given."""

    prepared: list
    refitted: list

    def prepare(self, layer, summary, valid):
        self.prepared.append((layer.index, summary, valid))
        return f"of layer {layer.index}"

    def refit(self, layer, summary, keys, values, kept, valid):
        self.refitted.append((layer.index, summary, kept, valid))


@pytest.mark.parametrize("chunk", [None, 16])
def test_what_is_prepared_of_a_whole_prompt_goes_to_scores_and_refit(chunk):
    model = models.text_model()
    method = Prepared([], [], [], [])
    settings = {"prefill": "chunked", "prompt_length": 40} if chunk else {}
    cache = PrefillSelectionCache(model, method, budget=5, **settings)
    inputs = models.left_padded([40, 30])
    for start in range(0, 40, chunk or 40):
        end = min(start + (chunk or 40), 40)
        ids, mask = inputs["input_ids"][:, start:end], inputs["attention_mask"][:, :end]
        prefill(model, cache, ids, attention_mask=mask)
    assert [entry[:2] for entry in method.prepared] == [(index, 40) for index in range(3)]
    assert all(entry[2].equal(inputs["attention_mask"].bool()) for entry in method.prepared)
    for calls in (method.scored, method.refitted):
        assert [entry[:2] for entry in calls] == [(index, f"of layer {index}") for index in range(3)]
        assert all(entry[-1].equal(inputs["attention_mask"].bool()) for entry in calls)
    assert all(entry[2].equal(cache.kept_indices(entry[0])) for entry in method.refitted)


def test_a_prompt_that_fits_is_not_scored():
    model = models.text_model()
    method = Recorder([], [])
    prefill(model, PrefillSelectionCache(model, method, budget=40), models.prompt_ids())
    assert method.scored == []


def test_the_method_of_the_contributor_notes():
    (snippet,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(encoding="utf-8"), re.S)
    model = models.text_model()
    names = {"model": model}
    exec(compile(snippet, "CONTRIBUTING.md", "exec"), names)
    method: Method = names["LongestValues"]()
    cache = PrefillSelectionCache(model, method, budget=4)
    prefill(model, cache, models.prompt_ids())
    values = []
    update = names["cache"].update
    names["cache"].update = lambda keys, states, index, **_: values.append(states) or update(keys, states, index)
    prefill(model, names["cache"], models.prompt_ids())
    best = values[0].norm(dim=-1)[..., :-1].topk(3).indices.sort().values
    assert cache.kept_indices(0)[..., :-1].equal(best)


@pytest.mark.parametrize("budget", [0, 1.5, True, "64"])
def test_every_cache_checks_its_budget(budget):
    with pytest.raises((TypeError, ValueError), match="budget="):
        PrefillSelectionCache(models.text_model(), Recorder([], []), budget)
