"""The peers of compare.py: each against a statement of its formula with loops, in float64."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import models
from benchmarks.quality import recall
from benchmarks.quality.comparison import COMPARED, OTHER_FAMILY, USUAL, Setup
from benchmarks.quality.peers import PEERS, Prompts, make_peer
from benchmarks.quality.peers.criticalkv import CriticalKV
from benchmarks.quality.peers.dropkv import DropKV
from benchmarks.quality.peers.full_attention import FullAttention
from benchmarks.quality.peers.kvzip import KVzip, repeated_attention
from mmshiftkv import CACHE_ARGUMENT, PrefillSelectionCache, make_cache
from mmshiftkv.registry import CACHES
from tiny_vlm.answering import answer_tokens, build_inputs
from tiny_vlm.pages import BUILTIN_FONTS, held_out_of_task

BUDGET, LENGTHS = 12, [40, 23, 13, 4]
INSTRUCTION = torch.tensor([9, 77, 31])
# Those that need nothing but the prefill.
PREFILLED = [name for name in PEERS if name not in ("kvzip", "full_attention")]
WINDOWS = {"snapkv_values": 3, "criticalkv": 3, "dropkv": 3, "last_query_values": 1}


class Head:
    """One KV head of one row of a prefill, in float64.

    Attention (r, T, T), values (T, D), and the output projections of its query heads (r, d, D).
    """

    def __init__(self, model, attentions, cache, mask, layer, row, head):
        def as_array(tensor):
            return tensor.detach().double().numpy()

        self.attention = as_array(attentions[layer][row].unflatten(0, (2, 2))[head])
        self.values = as_array(cache.layers[layer].values[row, head])
        weight = model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (2, 2, -1))
        self.projections = as_array(weight[:, head].transpose(0, 1))
        self.tokens = self.attention.shape[-1]
        self.first = int((mask[row] == 0).sum())


def window_scores(head, window, kernel_size):
    """SnapKV's attention of each token before the window; the row has more tokens than the window."""
    before = head.tokens - window
    mean = [0.0] * head.tokens
    for j in range(head.first, before):
        mean[j] = float(np.mean([attention[q, j] for attention in head.attention for q in range(before, head.tokens)]))
    half = kernel_size // 2
    return [sum(mean[max(j - half, 0) : j + half + 1]) / kernel_size for j in range(before)]


def by_score(head, scores, window, budget=BUDGET):
    """The window and the best of the tokens before it."""
    order = sorted(range(head.first, head.tokens - window), key=lambda j: -scores[j])
    return sorted([*order[: budget - window], *range(head.tokens - window, head.tokens)])


def stated_snapkv_values(head, window=3, kernel_size=5):
    attention = window_scores(head, window, kernel_size)
    return by_score(head, [a * math.sqrt(sum(v**2)) for a, v in zip(attention, head.values, strict=False)], window)


def stated_last_query_values(head):
    return stated_snapkv_values(head, window=1, kernel_size=1)


def stated_criticalkv(head, window=3):
    attention = window_scores(head, window, 5)
    others = list(range(head.first, head.tokens - window))
    kept = list(range(head.tokens - window, head.tokens))
    others.sort(key=lambda j: -attention[j])
    while len(kept) < BUDGET // 2:
        kept.append(others.pop(0))
    norms = [np.mean([sum(abs(output @ value) for output in w) for w in head.projections]) for value in head.values]
    others.sort(key=lambda j: -(attention[j] + 1e-4) * norms[j])
    return sorted([*kept, *others[: BUDGET - len(kept)]])


def squared_errors(head, window, epsilon):
    """The squared leave-one-out errors, summed over the window and averaged over the query heads."""
    total = [0.0] * head.tokens
    for attention in head.attention:
        for q in range(head.tokens - window, head.tokens):
            output = sum(attention[q, j] * head.values[j] for j in range(head.first, q + 1))
            for j in range(head.first, q + 1):
                change = attention[q, j] / (1 - attention[q, j] + epsilon) * (head.values[j] - output)
                total[j] += float(change @ change) / len(head.attention)
    return total


def stated_dropkv(head, window=3):
    errors = squared_errors(head, window, 1e-6)
    pooled = [sum(errors[max(j - 3, 0) : j + 4]) / 7 for j in range(head.tokens)]
    return by_score(head, pooled, window)


STATEMENTS = {
    "snapkv_values": stated_snapkv_values,
    "last_query_values": stated_last_query_values,
    "criticalkv": stated_criticalkv,
    "dropkv": stated_dropkv,
}


def prefill(model, inputs, cache):
    with torch.no_grad():
        model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)
    return cache


def peer(name, model, budget=BUDGET):
    return Setup(name, budget).make_cache(model)


def heads_of(model, inputs):
    """(layer, row, head number, Head) of a prefill with eager attention."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        output = model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True, output_attentions=True)
    for layer, row, head in np.ndindex(3, len(inputs["input_ids"]), 2):
        yield layer, row, head, Head(model, output.attentions, cache, inputs["attention_mask"], layer, row, head)


@pytest.mark.parametrize("name", PREFILLED)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", *models.SINKS_OR_CAPPING])
def test_the_kept_tokens_are_those_of_the_formula(name, model_type):
    inputs = models.left_padded(LENGTHS)
    if model_type in models.SINKS_OR_CAPPING:
        model = models.sinks_or_capping_model(model_type)
    else:
        model = models.text_model(model_type, attention="eager")
    cache = peer(name, model)
    prefill(model, inputs, cache)
    for layer, row, number, head in heads_of(model, inputs):
        kept = cache.kept_indices(layer)[row, number].tolist()
        short = LENGTHS[row] <= BUDGET
        assert kept == (list(range(40 - BUDGET, 40)) if short else STATEMENTS[name](head))


def test_the_error_is_what_leaving_a_token_out_changes():
    model, inputs = models.text_model(attention="eager"), models.left_padded([20])
    for *_, head in heads_of(model, inputs):
        changes = [0.0] * head.tokens
        for attention in head.attention:
            for q in range(18, 20):
                for j in range(head.tokens):
                    others = [i for i in range(q + 1) if i != j]
                    without = attention[q, others] @ head.values[others] / attention[q, others].sum()
                    changes[j] += ((without - attention[q] @ head.values) ** 2).sum() / 2
        assert squared_errors(head, 2, 0.0) == pytest.approx(changes, rel=1e-4)  # float32 attention


class Noted(DropKV):
    """DropKV that notes its errors."""

    def squared_errors(self, *arguments):
        noted.append(super().squared_errors(*arguments))
        return noted[-1]


noted: list[torch.Tensor] = []


@pytest.mark.parametrize("window", [2, 20])
def test_the_errors_are_those_of_the_formula(window):
    model, inputs = models.text_model(attention="eager"), models.left_padded([40, 30])
    noted.clear()
    prefill(model, inputs, PrefillSelectionCache(model, Noted(window=window), 25))
    for layer, row, number, head in heads_of(model, inputs):
        expected = torch.tensor(squared_errors(head, window, 1e-6), dtype=torch.float64)
        torch.testing.assert_close(noted[layer][row, number].double(), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", PREFILLED)
def test_a_row_keeps_the_same_tokens_as_alone_and_in_chunks(name):
    model, inputs = models.text_model(), models.left_padded(LENGTHS)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1  # zero otherwise, and so would be the values of padding
    together = prefill(model, inputs, peer(name, model))
    for row, length in enumerate(LENGTHS):
        alone = prefill(model, {"input_ids": inputs["input_ids"][row : row + 1, 40 - length :]}, peer(name, model))
        for layer in range(3):
            kept = together.kept_indices(layer)[row]
            assert (kept[kept >= 40 - length].view(2, -1) - (40 - length)).equal(alone.kept_indices(layer)[0])
    chunked = peer(name, model)
    model.generate(**inputs, **{CACHE_ARGUMENT: chunked}, max_new_tokens=2, do_sample=False, prefill_chunk_size=15)
    assert all(chunked.kept_indices(layer).equal(together.kept_indices(layer)) for layer in range(3))


@pytest.mark.parametrize("name", PREFILLED)
@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_the_window_is_kept_whatever_the_values_are(name, scale):
    model, inputs = models.text_model(), models.left_padded([40, 30])
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.v_proj.weight *= scale
            block.self_attn.k_proj.weight *= 30
    cache = prefill(model, inputs, peer(name, model))
    window = set(range(40 - WINDOWS[name], 40))
    assert all(window <= set(head) for layer in range(3) for row in cache.kept_indices(layer).tolist() for head in row)


def test_criticalkv_without_a_second_stage_is_snapkv():
    model, inputs = models.text_model(), models.left_padded([40, 30])
    snapkv = prefill(model, inputs, make_cache("snapkv", model, BUDGET, window=3))
    first_alone = CriticalKV(window=3, budget=BUDGET, first_stage_share=0.9999999)
    almost = prefill(model, inputs, PrefillSelectionCache(model, first_alone, BUDGET))
    for layer in range(3):
        same = (snapkv.kept_indices(layer)[..., None] == almost.kept_indices(layer)[..., None, :]).any(-1).sum(-1)
        assert (same >= BUDGET - 1).all()  # all places but one


def repeated(model, inputs):
    """What `repeated_attention` should give, one row after the other, with the prompt repeated in a single pass."""
    width = inputs["input_ids"].shape[1]
    scores = [torch.zeros(len(inputs["input_ids"]), 2, width) for _ in range(3)]
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        prompt = inputs["input_ids"][row : row + 1, width - length :]
        with torch.no_grad():
            output = model(torch.cat([prompt, INSTRUCTION[None], prompt], dim=1), output_attentions=True)
        for layer, attention in enumerate(output.attentions):
            for head in range(2):
                for token in range(length):
                    asked = attention[0, 2 * head : 2 * head + 2, length:, token]
                    scores[layer][row, head, width - length + token] = asked.max()
    return scores


@pytest.mark.parametrize("piece", [1, 7, 32])
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_kvzip_scores_by_the_attention_that_repeating_pays(model_type, piece, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.peers.kvzip.STEPS_AT_ONCE", piece)
    model, inputs = models.text_model(model_type, attention="eager"), models.left_padded(LENGTHS)
    found = repeated_attention(model, inputs, INSTRUCTION)
    for score, expected in zip(found, repeated(model, inputs), strict=True):
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-4)
    cache = prefill(model, inputs, PrefillSelectionCache(model, KVzip(found, sinks=2), BUDGET))
    for layer, row, head in np.ndindex(3, 2, 2):
        first, score = 40 - LENGTHS[row], found[layer][row, head].tolist()
        best = sorted(range(first + 2, 39), key=lambda j: -score[j])[: BUDGET - 3]
        assert cache.kept_indices(layer)[row, head].tolist() == sorted([first, first + 1, *best, 39])


def questions(processor, task="lookup", count=3):
    examples = list(held_out_of_task(task, count, 1, BUILTIN_FONTS))
    return build_inputs(processor, [one.image for one in examples], [one.question for one in examples])


def test_kvzip_repeats_pages_in_a_batch_as_alone(tiny):
    model, processor = tiny
    together = questions(processor)
    found = repeated_attention(model, together, INSTRUCTION)
    assert model.config._attn_implementation == "sdpa"
    examples = list(held_out_of_task("lookup", 3, 1, BUILTIN_FONTS))
    for row, example in enumerate(examples):
        alone = repeated_attention(model, build_inputs(processor, [example.image], [example.question]), INSTRUCTION)
        for score, expected in zip(found, alone, strict=True):
            padding = score.shape[2] - expected.shape[2]
            assert (score[row, :, :padding] == 0).all()
            torch.testing.assert_close(score[row, :, padding:], expected[0], atol=1e-4, rtol=1e-3)


def test_the_limit_keeps_what_decoding_attends_to_most(tiny):
    model, processor = tiny
    inputs = questions(processor)
    full = DynamicCache(config=model.config)
    attention = recall.decode_attention(model, inputs, answer_tokens(model, inputs, full, 24), full)
    prompts = Prompts(inputs, processor.tokenizer, attention)
    recalls = {}
    for name in ("full_attention", "snapkv", "dropkv", "kvzip", "half-mass"):
        cache = Setup(name, 30).make_cache(model, prompts)
        answer_tokens(model, inputs, cache, 1)
        recalls[name] = recall.recall(attention, cache)
        if name == "full_attention":
            for layer, row, head in np.ndindex(6, 3, 2):
                mass = attention[layer][row, head].tolist()
                best = sorted(range(len(mass) - 1), key=lambda j: -mass[j])[:29]
                assert cache.kept_indices(layer)[row, head].tolist() == [*sorted(best), len(mass) - 1]
    assert all((recalls["full_attention"] >= other).all() for other in recalls.values())


def test_scores_of_other_prompts_are_refused():
    model, inputs = models.text_model(), models.left_padded([40, 30])
    scores = [torch.rand(2, 2, 39)] * 3
    for wrong in ((), scores, scores[:0]):
        with pytest.raises(ValueError, match=r"scores: none of shape \(2, 2, 40\) for layer 0"):
            prefill(model, inputs, PrefillSelectionCache(model, FullAttention(wrong), BUDGET))


def test_compared_names_stand_for_a_method_and_settings():
    model = models.text_model()
    assert set(CACHES) | set(PEERS) | {"half-mass", "value-aware", *OTHER_FAMILY} == set(COMPARED)
    assert set(USUAL) == {*CACHES, "value-aware"}
    assert Setup("half-mass", 64).make_cache(model).config.mass == 0.5
    assert Setup("half-mass", 64).settings == {"mass": 0.5}
    assert Setup("value-aware", 64).settings == {"preset": "value-aware"}
    assert Setup("shiftkv", 64).settings == Setup("last_query_values", 64).settings == {}
    for name in ("snapkv", "snapkv_values", "criticalkv", "dropkv"):
        assert [Setup(name, budget).settings.get("window", 32) for budget in (256, 64, 10, 1)] == [32, 16, 2, 1]
        json.dumps(Setup(name, 64).settings)


@pytest.mark.parametrize(
    ("name", "budget", "settings", "error", "message"),
    [
        ("kvzip", 4, {}, ValueError, "budget=4 must be at least 5"),
        ("dropkv", 31, {}, ValueError, "budget=31 must be at least 32"),
        ("dropkv", 64, {"epsilon": 0}, ValueError, "epsilon=0 must be a finite number > 0"),
        ("criticalkv", 64, {"epsilon": -1}, ValueError, "epsilon=-1 must be a finite number >= 0"),
        ("criticalkv", 64, {"first_stage_share": 1}, ValueError, r"first_stage_share=1 must be in \[0, 1\)"),
        ("snapkv_values", 64, {"kernel_size": 4}, ValueError, "kernel_size=4 must be odd"),
        ("kvzip", 64, {"sinks": -1}, ValueError, "sinks=-1"),
    ],
)
def test_bad_settings_are_refused(name, budget, settings, error, message):
    with pytest.raises(error, match=message):
        make_peer(name, models.text_model(), budget, **settings)


def test_naming_the_peers_imports_nothing_slow():
    code = "import sys; import benchmarks.quality.comparison; print({'torch', 'mmshiftkv'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd="examples", capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


@pytest.mark.gpu
@models.requires_gpu
@pytest.mark.parametrize("name", PREFILLED)
def test_the_gpu_keeps_what_the_cpu_keeps(name):
    model, inputs = models.text_model(), models.left_padded(LENGTHS)
    expected = prefill(model, inputs, peer(name, model))
    model = model.to("cuda")
    found = prefill(model, {key: value.cuda() for key, value in inputs.items()}, peer(name, model))
    assert all(found.kept_indices(layer).cpu().equal(expected.kept_indices(layer)) for layer in range(3))
