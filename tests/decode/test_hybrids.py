"""Models with layers of other kinds decode in fixed storage as in storage that grows."""

import copy
import gc

import pytest
import torch
from test_loop import EndsAt
from torch._dynamo.utils import counters
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer

import models
from compiling import compiling, graphs
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, decode_ahead
from mmshiftkv.model.decoder import Decoder
from mmshiftkv.storage.states import StateLayer
from mmshiftkv.storage.static import obstacle_to_compiling
from mmshiftkv.storage.windows import WindowLayer

BUDGET = 5
WINDOW = 16
PROMPTS = {
    "longer than the window": {"input_ids": models.prompt_ids(1, 40)},
    "shorter": {"input_ids": models.prompt_ids(1, 7)},
    "one token": {"input_ids": models.prompt_ids(1, 1)},
    "padded": models.left_padded([40, 9]),
}
LOOPS = {"generate": {}, "decode_ahead": {"custom_generate": decode_ahead}}
FAMILIES = [name for name, changes in models.HYBRIDS.items() if "attention_chunk_size" not in changes]
# Sliding windows; a convolution: what is general is tested with one model of each kind.
SLIDING, CONVOLUTION, LINEAR = "gemma3_text", "lfm2", "qwen3_5_text"


def build(name):
    return models.text_model(name, **models.HYBRIDS[name])


def cache_of(model, room=None, **settings):
    return ShiftKVCache(model, budget=BUDGET, max_new_tokens=room, **settings)


def generate(model, cache, inputs, tokens=30, **options):
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    options = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    return model.generate(**inputs, **{CACHE_ARGUMENT: cache}, **options)


def forward(model, cache, ids):
    with torch.no_grad():
        return model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True).logits


def prefilled(model, room, inputs=None, answered=0):
    """A cache with a prompt, and with so many tokens of an answer."""
    cache = cache_of(model, room)
    forward(model, cache, models.prompt_ids(2) if inputs is None else inputs)
    for token in range(answered):
        forward(model, cache, models.prompt_ids(2, 1, seed=token))
    return cache


def assert_alike(found, expected):
    assert found.sequences.equal(expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def addresses(cache):
    held = []
    for layer in cache.layers:
        parts = [*layer.conv_states.values(), *layer.recurrent_states.values()] if isinstance(layer, StateLayer) else []
        held += [
            part.data_ptr()
            for part in (*parts, getattr(layer, "keys", None), getattr(layer, "values", None))
            if part is not None
        ]
    return held


class TestEveryFamily:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_decodes_as_with_growing_storage(self, name):
        """With room for few tokens windows move within their slots, and the selected layers to larger ones."""
        model = build(name)
        for prompt, inputs in PROMPTS.items():
            expected = generate(model, cache_of(model), inputs)
            for loop, options in LOOPS.items():
                room = 30 if (loop == "generate") == (prompt == "shorter") else 3
                cache = cache_of(model, room)
                assert cache.is_compileable
                assert_alike(generate(model, cache, inputs, **options), expected)
                for layer in cache.layers:
                    assert not isinstance(layer, WindowLayer) or layer.slots <= WINDOW - 1 + room + 8

    @pytest.mark.parametrize("name", FAMILIES)
    def test_goes_on_after_an_answer_that_ended_by_itself(self, name):
        """A step beyond the end is not taken, or taken back."""
        model, answers = build(name), []
        for room, options in ((None, {}), (40, LOOPS["decode_ahead"])):
            cache, found = cache_of(model, room), []
            ids = models.prompt_ids(1, 20)
            for length in (21, 33, 60):
                answer = generate(model, cache, ids, stopping_criteria=[EndsAt(length)], **options)
                assert answer.sequences.shape[1] == length
                assert int(cache.get_seq_length()) == length - 1
                found.append(answer)
                ids = torch.cat([answer.sequences, models.prompt_ids(1, 5, seed=length)], dim=1)
            answers.append(found)
        for expected, found in zip(*answers, strict=True):
            assert_alike(found, expected)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_prompts_in_chunks(self, name):
        model = build(name)
        expected = generate(model, cache_of(model), models.prompt_ids(), prefill_chunk_size=7)
        assert_alike(generate(model, cache_of(model, 30), models.prompt_ids(), prefill_chunk_size=7), expected)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_beams(self, name):
        model = build(name)
        inputs, options = models.left_padded([30, 12]), {"num_beams": 3, "tokens": 24, "output_logits": False}
        expected = generate(model, cache_of(model), inputs, **options)
        assert generate(model, cache_of(model, 24), inputs, **options).sequences.equal(expected.sequences)


class TestOneCompilation:
    @pytest.mark.parametrize("name", [SLIDING, CONVOLUTION])
    def test_serves_all_prompts_and_caches_in_one_place(self, name, no_garbage_collection):
        """transformers' own StaticCache is compiled twice with sliding windows, and once with convolutions."""
        torch._dynamo.reset()
        counters.clear()
        model, places = build(name), set()
        for index, tokens in enumerate((40, 3, 16, 15, 60)):
            prompt = models.prompt_ids(1, tokens)
            expected = generate(model, cache_of(model), prompt)
            cache = cache_of(model, 30)
            for loop in LOOPS.values():
                cache.reset()
                assert_alike(generate(model, cache, prompt, compile_config=compiling(), **loop), expected)
                places.add(tuple(addresses(cache)))
            del cache
            if index == 0:
                gc.collect()  # the tracer left the cache in a cycle
        assert graphs() == 1
        assert not counters["graph_break"]
        assert len(places) == 1
        torch._dynamo.reset()


@pytest.mark.parametrize("name", [SLIDING, CONVOLUTION, LINEAR])
class TestChanges:
    @pytest.mark.parametrize("answered", [0, 1, 20])
    def test_copies_answer_as_the_cache_does(self, name, answered):
        model = build(name)
        expected = forward(model, prefilled(model, None, answered=answered), models.prompt_ids(2, 1))
        cache = prefilled(model, 4, answered=answered)
        twin = copy.deepcopy(cache)
        assert not set(addresses(twin)) & set(addresses(cache))
        for each in (twin, cache):
            torch.testing.assert_close(forward(model, each, models.prompt_ids(2, 1)), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("answered", [0, 20])
    def test_rows(self, name, answered):
        model = build(name)
        cache = prefilled(model, 4, answered=answered)
        both = forward(model, copy.deepcopy(cache), models.prompt_ids(2, 1, seed=3).flip(0))
        for change, rows in (
            (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        ):
            twin = copy.deepcopy(cache)
            change(twin)
            found = forward(model, twin, models.prompt_ids(2, 1, seed=3).flip(0)[rows])
            torch.testing.assert_close(found, both[rows], atol=1e-4, rtol=1e-4)

    def test_what_was_there_before_does_not_matter(self, name):
        model = build(name)
        cache = prefilled(model, 4, answered=20)
        for layer in cache.layers:
            states = layer.conv_states if isinstance(layer, StateLayer) else {0: layer.keys, 1: layer.values}
            for part in states.values():
                part.fill_(float("nan"))
        cache.reset()
        expected = generate(model, cache_of(model), models.prompt_ids(2))
        assert_alike(generate(model, cache, models.prompt_ids(2)), expected)

    def test_larger_batches_than_the_one_stored_are_refused(self, name):
        model = build(name)
        with pytest.raises((ValueError, RuntimeError)):
            forward(model, prefilled(model, 4, answered=1), models.prompt_ids(3, 1))


class TestCropping:
    @pytest.mark.parametrize("tokens", [40, 7])
    def test_takes_back_what_is_still_there(self, tokens):
        model = build(SLIDING)
        prompt, more = models.prompt_ids(2, tokens), models.prompt_ids(2, 9, seed=1)
        cache = prefilled(model, 20, prompt, answered=2)
        expected = forward(model, copy.deepcopy(cache), more[:, :1])
        for start in range(5):
            forward(model, cache, more[:, start : start + 1])
        cache.crop(0)
        cache.crop(-5)
        assert int(cache.get_seq_length()) == tokens + 2
        torch.testing.assert_close(forward(model, cache, more[:, :1]), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("room", [None, 3])
    def test_refuses_what_has_left_the_window(self, room):
        model = build(SLIDING)
        cache = prefilled(model, room, answered=20)
        seen = [layer.get_seq_length() for layer in cache.layers]
        with pytest.raises(ValueError, match="tokens_to_remove=-12: a layer has a window of 16 tokens, and those"):
            cache.crop(-12)
        assert [layer.get_seq_length() for layer in cache.layers] == seen

    @pytest.mark.parametrize("room", [None, 30])
    def test_refuses_states_that_hold_all_tokens(self, room):
        model = models.text_model(
            CONVOLUTION, **{**models.HYBRIDS[CONVOLUTION], "layer_types": ["full_attention", "conv", "conv"]}
        )
        cache = prefilled(model, room, answered=2)
        with pytest.raises(ValueError, match="tokens_to_remove=-1: a layer of linear attention or convolution"):
            cache.crop(-1)
        assert int(cache.get_seq_length()) == 42
        cache.crop(0)
        assert int(cache.get_seq_length()) == 42


def test_rows_of_growing_states_are_refused_and_nothing_is_changed():
    model = build(CONVOLUTION)
    cache = prefilled(model, None)
    with pytest.raises(ValueError, match="batch_select_indices: layers of the kind LinearAttentionLayer have no such"):
        cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[1].keys.shape[0] == 2


@pytest.mark.parametrize("name", [SLIDING, CONVOLUTION])
def test_assisted_decoding(name):
    """Storage grows then, in all layers."""
    model, prompt = build(name), models.prompt_ids(1, 10).repeat(1, 5)
    expected = generate(model, DynamicCache(config=model.config), prompt, prompt_lookup_num_tokens=6)
    cache = ShiftKVCache(model, budget=1.0, max_new_tokens=30)
    found = generate(model, cache, prompt, prompt_lookup_num_tokens=6)
    assert found.sequences.equal(expected.sequences)
    assert not cache.is_compileable


def test_recording_begins_after_the_prompt():
    """As transformers does on some devices, for a step that it takes back; it ends the recording then."""
    model = build(SLIDING)
    cache = prefilled(model, 30, answered=3)
    other = copy.deepcopy(cache)
    cache.activate_past_recording()
    assert not cache.is_compileable
    forward(model, cache, models.prompt_ids(2, 1))
    cache.crop(-1)
    for layer in cache.layers:
        layer.record_past = False
    assert cache.is_compileable
    step = models.prompt_ids(2, 1)
    torch.testing.assert_close(forward(model, cache, step), forward(model, other, step), atol=1e-4, rtol=1e-4)


def test_windows_of_a_prompt_hold_no_more_than_the_window():
    """transformers keeps a view of the whole prompt until the next token."""
    cache = prefilled(build(SLIDING), 4)
    assert cache.layers[0].keys.untyped_storage().nbytes() == 2 * 2 * (WINDOW - 1) * 16 * 4


def test_the_report_counts_slots_of_windows_and_states():
    model = build(SLIDING)
    cache = prefilled(model, 4, answered=1)
    token, slots = 2 * 2 * 16 * 4 * 2, 24  # rows, KV heads, head dim, bytes, keys and values; 15 + 4, in eights
    window, selected, _ = cache.report().layers
    assert (window.tokens_seen, window.tokens_stored) == (41, WINDOW)
    assert (window.bytes_stored, window.bytes_reserved) == (slots * token, (slots - WINDOW) * token)
    assert window.bytes_full == (WINDOW - 1) * token
    assert (selected.tokens_seen, selected.tokens_stored) == (41, BUDGET + 1)
    model = build(LINEAR)
    fixed, growing = (prefilled(model, room, answered=1).report().layers[0] for room in (4, None))
    assert fixed == growing


def test_chunks_stay_eager():
    """transformers compiles no Llama 4 either."""
    model = build("llama4_text")
    with pytest.warns(UserWarning, match="transformers compiles no decoding with chunked attention"):
        cache = cache_of(model, 30)
    assert not cache.is_compileable
    assert_alike(generate(model, cache, models.prompt_ids()), generate(model, cache_of(model), models.prompt_ids()))


def test_layers_that_hold_tokens_by_rules_of_their_own_stay_eager():
    decoder = Decoder(models.text_model(), [0, 1])
    layers = [DynamicLayer(), DynamicLayer(), DynamicIndexedLayer()]
    found = obstacle_to_compiling(decoder, layers)
    assert found == "1 of 3 layers (DynamicIndexedLayer) have no storage of a fixed size"
    assert obstacle_to_compiling(decoder, layers[:2]) is None
