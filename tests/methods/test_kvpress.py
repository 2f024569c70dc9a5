"""The baselines keep what NVIDIA's kvpress keeps, of the same models and prompts.

What kvpress keeps is on record in data/kvpress_reference.json.  Where kvpress is installed, the record itself is
checked as well: `pip install kvpress && pip install -U transformers` (kvpress asks for an older one, which mmshiftkv
does not run with; its scores work with both).
"""

import functools
import importlib.util
import json

import pytest
import torch

import kvpress_reference as reference
from mmshiftkv import make_cache

RECORD = json.loads(reference.RECORD.read_text(encoding="utf-8"))
cached_model = functools.cache(reference.model_of)


@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("prefill", ["single", "chunked"])
def test_a_baseline_keeps_what_kvpress_keeps(case, prefill):
    name, method, settings, *_ = reference.CASES[case]
    model, prompt = cached_model(name), reference.prompt()
    cache = make_cache(method, model, reference.BUDGET, prefill=prefill, **settings)
    with torch.no_grad():
        for chunk in prompt.split(50 if prefill == "chunked" else reference.TOKENS, dim=1):
            model(chunk, past_key_values=cache, use_cache=True)
        cache.end_prompt()
        model(prompt[:, :1], past_key_values=cache, use_cache=True)
    assert [cache.kept_indices(layer)[0].tolist() for layer in range(3)] == RECORD["kept"][case]


def test_methods_keep_different_tokens():
    for model in reference.MODELS:
        kept = [RECORD["kept"][case] for case in reference.CASES if reference.CASES[case][0] == model]
        assert all(first != second for i, first in enumerate(kept) for second in kept[:i])


@pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="needs kvpress")
@pytest.mark.parametrize("model", reference.MODELS)
def test_the_record_is_what_kvpress_keeps(model):
    layers = reference.prefilled(reference.model_of(model))
    for case, (name, _, _, press, settings) in reference.CASES.items():
        if name == model:
            assert reference.kept_by_kvpress(layers, press, settings) == RECORD["kept"][case], case
