"""Peers keep what NVIDIA's kvpress keeps, of the same models and prompt.

What kvpress keeps is on record in data/kvpress_peers_reference.json; kvpress_peers_reference.py makes it.  Where
kvpress is installed, with DropKV in it, the record itself is checked as well.
"""

import functools
import importlib.util
import json

import pytest
import torch

import kvpress_peers_reference as peers_reference
import kvpress_reference as reference
from benchmarks.quality.peers import make_peer
from benchmarks.quality.peers.kvzip import KVzip, repeated_attention
from mmshiftkv import CACHE_ARGUMENT, PrefillSelectionCache

RECORD = json.loads(peers_reference.RECORD.read_text(encoding="utf-8"))
HAS_DROPKV = importlib.util.find_spec("kvpress") and importlib.util.find_spec("kvpress.presses.dropkv_press")
cached_model = functools.cache(reference.model_of)


def peer_cache(name, model, prompt, settings):
    if name != "kvzip":
        return make_peer(name, model, reference.BUDGET, **settings)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    scores = repeated_attention(model, inputs, peers_reference.INSTRUCTION)
    return PrefillSelectionCache(model, KVzip(scores, **settings), reference.BUDGET)


@pytest.mark.parametrize("case", peers_reference.CASES)
def test_a_peer_keeps_what_kvpress_keeps(case):
    name, peer, settings, *_ = peers_reference.CASES[case]
    model, prompt = cached_model(name), reference.prompt()
    cache = peer_cache(peer, model, prompt, settings)
    with torch.no_grad():
        model(prompt, **{CACHE_ARGUMENT: cache}, use_cache=True)
    assert [cache.kept_indices(layer)[0].tolist() for layer in range(3)] == RECORD["kept"][case]


def test_peers_keep_different_tokens():
    for model in reference.MODELS:
        kept = [RECORD["kept"][case] for case, (name, *_) in peers_reference.CASES.items() if name == model]
        assert all(first != second for i, first in enumerate(kept) for second in kept[:i])


@pytest.mark.skipif(not HAS_DROPKV, reason="needs kvpress with DropKV")
@pytest.mark.parametrize("case", peers_reference.CASES)
def test_the_record_is_what_kvpress_keeps(case):
    name, _, _, press, settings = peers_reference.CASES[case]
    if press == "KVzipPress" and CACHE_ARGUMENT == "cache":
        pytest.skip("KVzip of kvpress 0.5.5 does not find its cache since transformers 5.24")
    assert peers_reference.kept_by_kvpress(reference.model_of(name), press, settings) == RECORD["kept"][case]
