"""Every way of decoding that `generate` has, over model families and both kinds of storage.

What of `generate` touches a cache (transformers 5.17 to 5.24, generation/utils.py), and where it is tested:

- `_sample`: greedy, sampling, several sequences, eos in one row before another, stopping criteria, streamers: here.
- `_beam_search`: `reorder_cache` after every step; greedy and sampled beams, several sequences: here.
- `_assisted_decoding`: `activate_past_recording`, `is_croppable`, then `crop` after every step, with candidates of an
  assistant model, of the model's own first layers, or looked up in the prompt: here.  What drafts with a cache of its
  own kind (multi-token prediction, diffusion drafts) needs models made for it, and asks the main cache for the same.
- Classifier-free guidance runs the model between the steps, with a cache that it makes itself: here.
- `custom_generate`: here, and tests/decode/test_loop.py for ours.
- Contrastive search, DoLa, group and constrained beam search are repositories of code that `generate` fetches, and
  refuses to fetch unless it is told to trust them: here.
- `_prepare_cache_for_generation` (a cache with `cache_implementation`, a tuple, `use_cache=False`),
  `_valid_auto_compile_criteria` and `_prefill` in chunks: test_generate_arguments.py.  `cache_implementation="paged"`
  is another engine, which leaves a given cache alone.
- `_prefill` with a cache that holds something (whole conversations, new tokens with the whole mask, embeddings), and
  `_expand_inputs_for_generation` with a cache of one row: test_turns.py.
- The outputs' `cache` or `past_key_values`, scores, attentions and hidden states: test_output_shapes.py.
- Deferred stop checks (`activate_past_recording` after the prompt, then `crop(0)` or `crop(-1)`) belong to one kind of
  device; their calls are here.
"""

import functools

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import models
from caches import (
    FAMILIES_AND_STORAGES,
    NEW_TOKENS,
    STORAGES,
    assert_same,
    contents,
    covering,
    dynamic,
    filled,
    forward,
    generate,
    model_of,
)
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache

BUDGET = 7


def assistant():
    """A smaller model with the same vocabulary."""
    return model_of("llama", layers=1)


# Mode -> what `generate` is given.
MODES = {
    "greedy": lambda: {},
    "sampling": lambda: {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "sequences": lambda: {"do_sample": True, "num_return_sequences": 3},
    "beams": lambda: {"num_beams": 3},
    "beam-sequences": lambda: {"num_beams": 3, "num_return_sequences": 2},
    "sampled-beams": lambda: {"num_beams": 2, "do_sample": True, "top_k": 20},
    "guidance": lambda: {"guidance_scale": 1.5},
    "negative-prompt": lambda: {"guidance_scale": 1.5, "negative_prompt_ids": models.prompt_ids(2, 9, seed=7)},
}
ASSISTED_MODES = {
    "assistant": lambda: {"assistant_model": assistant()},
    "assistant-sampling": lambda: {"assistant_model": assistant(), "do_sample": True, "top_k": 20},
    "own-first-layer": lambda: {"assistant_early_exit": 1},
    "prompt-lookup": lambda: {"prompt_lookup_num_tokens": 4},
}


# Where a config lists the kinds of all layers, the cache that 5.17 makes for the first layer alone cannot be cropped.
EXITS_EARLY = ("llama", "mistral", "mixtral")


def inputs_of(mode):
    if mode in ASSISTED_MODES:
        # A text that repeats itself, so that candidates are found; one row, as assisted decoding demands.
        return {"input_ids": models.prompt_ids(1, 8).repeat(1, 3)}
    return models.left_padded([24, 13])


def options_of(mode):
    return (MODES | ASSISTED_MODES)[mode]()


@functools.cache
def of_a_dynamic_cache(family, mode):
    model = model_of(family)
    return generate(model, dynamic(model), inputs_of(mode), **options_of(mode))


@functools.cache
def of_growing_storage(family, mode):
    model = model_of(family)
    return generate(model, ShiftKVCache(model, budget=BUDGET), inputs_of(mode), **options_of(mode))


def cases(names):
    return [
        pytest.param(family, storage, mode, id=f"{family}-{storage}-{mode}")
        for family, storage in FAMILIES_AND_STORAGES
        for mode in names
        if mode != "own-first-layer" or family in EXITS_EARLY
    ]


@pytest.mark.parametrize(("family", "storage", "mode"), cases([*MODES, *ASSISTED_MODES]))
def test_a_covering_budget_gives_what_a_dynamic_cache_gives(family, storage, mode):
    model, expected = model_of(family), of_a_dynamic_cache(family, mode)
    cache = covering(model, storage)
    found = generate(model, cache, inputs_of(mode), **options_of(mode))
    assert found.sequences.equal(expected.sequences)
    assert_same(found.logits, expected.logits, storage)
    assert found[CACHE_ARGUMENT] is cache
    assert cache.get_seq_length() == expected[CACHE_ARGUMENT].get_seq_length()
    if "num_beams" in options_of(mode):
        assert found.beam_indices.equal(expected.beam_indices)
        assert_same(found.sequences_scores, expected.sequences_scores, storage)


@pytest.mark.parametrize(("family", "storage", "mode"), cases(["greedy", "sequences", "beams", "prompt-lookup"]))
def test_a_small_budget_gives_the_same_whatever_the_storage(family, storage, mode):
    model, inputs = model_of(family), inputs_of(mode)
    cache = ShiftKVCache(model, budget=BUDGET, **STORAGES[storage])
    found, expected = generate(model, cache, inputs, **options_of(mode)), of_growing_storage(family, mode)
    assert found.sequences.equal(expected.sequences)
    prompt = inputs["input_ids"].shape[1]
    assert found.sequences.shape[1] == prompt + NEW_TOKENS
    assert int(cache.get_seq_length()) == cache.report().tokens_seen == prompt + NEW_TOKENS - 1
    rows = {"greedy": 2, "sequences": 6, "beams": 6, "prompt-lookup": 1}[mode]
    for index, (keys, values) in enumerate(contents(cache)):
        if cache.kept_indices(index) is not None:
            assert cache.kept_indices(index).shape == (rows, 2, BUDGET)
            # Accepted candidates of the first pass are selected from like the prompt's tokens.
            most = BUDGET + NEW_TOKENS - 1
            assert keys.shape == values.shape
            assert keys.shape[2] == most or (mode == "prompt-lookup" and BUDGET <= keys.shape[2] <= most)
    assert models.hooks_on(model) == 0


def test_beams_move_and_take_their_rows_along():
    model = model_of("llama")
    found = generate(model, ShiftKVCache(model, budget=BUDGET), models.prompt_ids(1, 24), num_beams=3)
    assert found.beam_indices.unique().numel() > 1


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("budget", [BUDGET, 1.0])
class TestEndings:
    def cache(self, budget, storage):
        return ShiftKVCache(model_of("llama"), budget=budget, **STORAGES[storage])

    def test_a_row_that_ends_before_the_others_is_padded(self, storage, budget):
        model, inputs = model_of("llama"), models.left_padded([24, 13])
        plain = generate(model, self.cache(budget, storage), inputs).sequences
        end = plain[0, 24 + 2].item()
        found = generate(model, self.cache(budget, storage), inputs, eos_token_id=end, min_new_tokens=None).sequences
        assert found[0, : 24 + 3].equal(plain[0, : 24 + 3])
        assert found[0, 24 + 3 :].eq(0).all()
        assert found[1].equal(plain[1, : found.shape[1]])

    def test_stopping_criteria_end_all_rows(self, storage, budget):
        class Stop(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full(input_ids.shape[:1], input_ids.shape[1] >= 24 + 3)

        model, inputs, cache = model_of("llama"), models.left_padded([24, 13]), self.cache(budget, storage)
        plain = generate(model, self.cache(budget, storage), inputs).sequences
        found = generate(model, cache, inputs, stopping_criteria=StoppingCriteriaList([Stop()]))
        assert found.sequences.equal(plain[:, : 24 + 3])
        assert cache.get_seq_length() == 24 + 2

    def test_a_streamer_hears_every_token(self, storage, budget):
        class Collect(BaseStreamer):
            def __init__(self):
                self.tokens, self.has_ended = [], False

            def put(self, value):
                self.tokens += value.flatten().tolist()

            def end(self):
                self.has_ended = True

        model, streamer = model_of("llama"), Collect()
        found = generate(model, self.cache(budget, storage), models.prompt_ids(1, 24), streamer=streamer)
        assert streamer.tokens == found.sequences[0].tolist()
        assert streamer.has_ended

    def test_a_stop_that_is_noticed_one_step_late_is_undone(self, storage, budget):
        """What deferred stop checks do: they record from the end of the prompt on, and take one token back."""
        model, ids = model_of("llama"), models.prompt_ids(1, 28)
        found, expected = (filled(model, self.cache(budget, storage), ids[:, :24]) for _ in range(2))
        found.activate_past_recording()
        for position in range(24, 28):
            found.crop(0)
            forward(model, found, ids[:, position : position + 1])
        found.crop(-1)
        for position in range(24, 27):
            forward(model, expected, ids[:, position : position + 1])
        assert found.is_croppable
        assert_same(contents(found), contents(expected))
        assert found.get_seq_length() == expected.get_seq_length() == 27


def greedy_loop(model, input_ids, generation_config, **kwargs):
    """A decoding loop of a user's own."""
    step = input_ids
    for _ in range(generation_config.max_new_tokens):
        step = forward(model, kwargs[CACHE_ARGUMENT], step).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, step], dim=1)
    return input_ids


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("budget", [BUDGET, 1.0])
def test_a_custom_loop_is_given_the_cache(storage, budget):
    model, ids = model_of("llama"), models.prompt_ids(2, 24)
    expected = generate(model, ShiftKVCache(model, budget=budget), ids, suppress_tokens=None, min_new_tokens=None)
    cache = ShiftKVCache(model, budget=budget, **STORAGES[storage])
    found = generate(model, cache, ids, custom_generate=greedy_loop, min_new_tokens=None)
    assert found[:, : expected.sequences.shape[1]].equal(expected.sequences)
    assert cache.get_seq_length() == 24 + NEW_TOKENS - 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"penalty_alpha": 0.6, "top_k": 4}, id="contrastive"),
        pytest.param({"dola_layers": "low"}, id="dola"),
        pytest.param({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, id="group-beams"),
        pytest.param({"num_beams": 4, "force_words_ids": [[5]]}, id="constrained-beams"),
    ],
)
def test_modes_that_moved_to_other_repositories_are_not_fetched(options):
    model = model_of("llama")
    cache = ShiftKVCache(model, budget=BUDGET)
    with pytest.raises(ValueError, match="trust_remote_code"):
        generate(model, cache, models.prompt_ids(), **options)
    assert cache.get_seq_length() == 0
    assert generate(model, cache, models.prompt_ids()).sequences.shape == (1, 40 + NEW_TOKENS)
