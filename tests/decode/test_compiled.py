"""With `max_new_tokens` decoding is compiled once, in storage that stays where it is."""

import copy
import gc
import logging

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

import models
from compiling import compiling, graphs
from mmshiftkv import PrefillSelectionCache, ShiftKVCache, SnapKVCache

NEW_TOKENS = 12


def generate(model, inputs, cache, **options):
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    return model.generate(**inputs, past_key_values=cache, **options)


def compiled(model, inputs, cache, **options):
    return generate(model, inputs, cache, compile_config=compiling(), **options)


def prefill(model, cache, ids):
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


def addresses(cache):
    return [layer.keys.data_ptr() for layer in cache.layers]


@pytest.fixture
def model():
    torch._dynamo.reset()
    counters.clear()
    yield models.text_model()
    torch._dynamo.reset()


class TestOneCompilation:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_serves_prompts_of_all_lengths_and_new_caches(self, attention):
        torch._dynamo.reset()
        counters.clear()
        model = models.text_model(attention=attention)
        for tokens in (40, 50, 1, 8, 9, 10, 300, 41):
            inputs = models.prompt_ids(1, tokens)
            found = compiled(model, inputs, ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS))
            assert found.equal(generate(model, inputs, ShiftKVCache(model, budget=9)))
        assert graphs() == 1
        assert not counters["graph_break"]

    def test_serves_left_padded_batches_and_rows_shorter_than_the_budget(self, model):
        for lengths in ([40, 17], [33, 3], [7, 5], [9, 9]):
            inputs = models.left_padded(lengths)
            found = compiled(model, inputs, ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS))
            assert found.equal(generate(model, inputs, ShiftKVCache(model, budget=9)))
        assert graphs() == 1

    def test_serves_a_cache_that_was_reset(self, model):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS)
        for tokens in (40, 5, 60):
            inputs = models.prompt_ids(1, tokens)
            found = compiled(model, inputs, cache)
            assert found.equal(generate(model, inputs, ShiftKVCache(model, budget=9)))
            before = addresses(cache)
            cache.reset()
            assert cache.get_seq_length() == 0
            assert cache.kept_indices(0) is None
        assert addresses(prefill(model, cache, models.prompt_ids())) == before
        assert graphs() == 1

    def test_serves_other_policies_with_the_same_storage(self, model):
        inputs = models.prompt_ids()
        compiled(model, inputs, ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS))
        found = compiled(model, inputs, SnapKVCache(model, budget=9, window=4, max_new_tokens=NEW_TOKENS))
        assert found.equal(generate(model, inputs, SnapKVCache(model, budget=9, window=4)))
        assert issubclass(SnapKVCache, PrefillSelectionCache)
        assert graphs() == 2  # another class of cache

    def test_serves_sampling_and_several_sequences(self, model):
        for _ in range(2):
            found = []
            for room, run in ((NEW_TOKENS, compiled), (None, generate)):
                torch.manual_seed(3)
                cache = ShiftKVCache(model, budget=9, max_new_tokens=room)
                found.append(run(model, models.prompt_ids(), cache, do_sample=True, num_return_sequences=3))
            assert found[0].equal(found[1])
        assert graphs() == 1

    def test_image_prompts(self, vision_case):
        torch._dynamo.reset()
        counters.clear()
        case = vision_case("qwen2_5_vl")
        for size in ((224, 168), (140, 280)):
            inputs = case.inputs(("What is the Total?", models.document_image(*size)))
            found = compiled(case.model, inputs, ShiftKVCache(case.model, budget=24, max_new_tokens=NEW_TOKENS))
            assert found.equal(generate(case.model, inputs, ShiftKVCache(case.model, budget=24)))
        assert graphs() == 1
        torch._dynamo.reset()

    def test_beams(self, model):
        inputs = models.prompt_ids(2, 30)
        cache = ShiftKVCache(model, budget=7, max_new_tokens=NEW_TOKENS)
        found = compiled(model, inputs, cache, num_beams=3)
        before = addresses(cache)
        cache.reorder_cache(torch.arange(6).flip(0))
        assert addresses(cache) == before
        assert found.equal(generate(model, inputs, ShiftKVCache(model, budget=7), num_beams=3))
        assert graphs() == 0  # transformers compiles no beam search


class TestChunks:
    @pytest.mark.parametrize("settings", [{}, {"prefill": "chunked"}, {"prefill": "chunked", "prompt_length": 40}])
    def test_are_prefilled_eagerly_and_decoded_compiled(self, model, settings):
        expected = generate(model, models.prompt_ids(), ShiftKVCache(model, budget=9))
        for chunk in (7, 39, 13):
            cache = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS, **settings)
            assert compiled(model, models.prompt_ids(), cache, prefill_chunk_size=chunk).equal(expected)
            assert cache.report().tokens_stored == 9 + NEW_TOKENS - 1
        assert graphs() == 1


class TestStorage:
    def test_is_taken_over_by_the_next_cache(self, model, no_garbage_collection):
        cache = prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=5), models.prompt_ids())
        before = addresses(cache)
        other = prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=5), models.prompt_ids(1, 20))
        assert not set(addresses(other)) & set(before)
        del cache
        assert addresses(prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=5), models.prompt_ids())) == before

    def test_of_a_cache_that_goes_late_is_not_taken(self, model, no_garbage_collection):
        """As that of a cache with which a step was traced: the tracer leaves it in a cycle."""
        late = prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=5), models.prompt_ids())
        late.itself, before = late, addresses(late)
        del late
        younger = prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=5), models.prompt_ids())
        after = addresses(younger)
        assert not set(after) & set(before)
        del younger
        gc.collect()
        assert addresses(prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=5), models.prompt_ids())) == after

    def test_goes_with_its_model(self, model):
        from mmshiftkv.storage import buffers

        prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=5), models.prompt_ids())
        gc.collect()
        assert model.model.layers[0] in buffers._unused
        kept = len(buffers._unused)
        another = models.text_model()
        prefill(another, ShiftKVCache(another, budget=9, max_new_tokens=5), models.prompt_ids())
        gc.collect()
        assert len(buffers._unused) == kept + 1
        del another
        gc.collect()
        assert len(buffers._unused) == kept

    def test_has_room_for_the_budget_and_the_new_tokens_whatever_the_prompt(self, model):
        for budget, tokens, slots in ((9, 40, 14), (9, 4, 14), (0.25, 40, 15), (1.0, 40, 45)):
            cache = prefill(model, ShiftKVCache(model, budget=budget, max_new_tokens=5), models.prompt_ids(2, tokens))
            assert [layer.slots for layer in cache.layers] == [slots] * 3
            assert cache.report().bytes_stored == 3 * slots * 2 * 2 * 16 * 4 * 2

    def test_at_the_shape_of_a_7b_model(self):
        """Qwen2.5-VL-7B has 28 layers of 4 KV heads of 128; its 32,768 tokens would be 1.75 GiB."""
        shape = {
            "num_hidden_layers": 28,
            "hidden_size": 56,
            "head_dim": 128,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        }
        model = models.text_model(**shape).to(torch.bfloat16)
        cache = prefill(model, ShiftKVCache(model, budget=64, max_new_tokens=256), models.prompt_ids(1, 100))
        assert cache.report().bytes_stored == 17.5 * 2**20
        storage = [part.untyped_storage().nbytes() for layer in cache.layers for part in (layer.keys, layer.values)]
        assert sum(storage) == 17.5 * 2**20

    def test_what_was_there_before_does_not_matter(self, model):
        """Slots not yet written are multiplied by zero, so they must hold numbers."""
        inputs = models.prompt_ids()
        expected = generate(model, inputs, ShiftKVCache(model, budget=9))
        for tokens in (40, 5):
            inputs = models.prompt_ids(1, tokens)
            expected = generate(model, inputs, ShiftKVCache(model, budget=9))
            cache = prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS), inputs)
            for layer in cache.layers:
                layer.keys.fill_(float("nan"))
                layer.values.fill_(float("nan"))
            cache.reset()
            assert generate(model, inputs, cache).equal(expected)

    def test_is_written_outside_of_inference_mode_too(self, model):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS)
        with torch.inference_mode():
            prefill(model, cache, models.prompt_ids())
        del cache
        gc.collect()
        inputs = models.prompt_ids()
        found = generate(model, inputs, ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS))
        assert found.equal(generate(model, inputs, ShiftKVCache(model, budget=9)))


class TestOverflow:
    @pytest.mark.parametrize("run", [generate, compiled])
    def test_moves_to_larger_storage(self, model, run, caplog):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=4)
        with caplog.at_level(logging.WARNING, logger="mmshiftkv"):
            found = run(model, models.prompt_ids(), cache)
        assert found.equal(generate(model, models.prompt_ids(), ShiftKVCache(model, budget=9)))
        assert [record.message for record in caplog.records] == [
            "more tokens than max_new_tokens=4: the cache moves to storage of 26 slots, decoding is compiled again"
        ]
        assert cache.report().tokens_stored == 9 + NEW_TOKENS - 1

    def test_of_a_budget_far_above_the_prompt_is_not_feared(self, model):
        cache = prefill(model, ShiftKVCache(model, budget=10**7, max_new_tokens=4), models.prompt_ids())
        assert [layer.slots for layer in cache.layers] == [4096 + 4] * 3

    def test_is_met_with_the_last_slot_and_not_before(self, model):
        for tokens in (40, 5):
            cache = ShiftKVCache(model, budget=5, max_new_tokens=NEW_TOKENS - 1)
            compiled(model, models.prompt_ids(1, tokens), cache)
            assert cache.report().tokens_stored == cache.layers[0].slots

    def test_is_not_suspected_of_masks_that_were_asked_for_in_vain(self, model):
        cache = prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=4), models.prompt_ids())
        for _ in range(20):
            assert cache.get_mask_sizes(1, 0) == (13, 31)
        with torch.no_grad():
            for _ in range(4):
                model(models.prompt_ids(1, 1), past_key_values=cache, use_cache=True)
        assert cache.report().tokens_stored == 13

    def test_is_seen_where_no_mask_is_asked_for(self, model):
        cache = prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=2), models.prompt_ids())
        states = torch.zeros(1, 2, 1, 16)
        for _ in range(3):
            for layer in range(3):
                cache.update(states, states, layer)
        assert [layer.slots for layer in cache.layers] == [22] * 3
        assert cache.report().tokens_stored == 12


class TestLaterTurns:
    def conversation(self, model, cache, run, turns=(15, 15, 4)):
        ids = run(model, models.prompt_ids(), cache)
        for tokens in turns:
            ids = run(model, torch.cat([ids, models.prompt_ids(1, tokens, seed=tokens)], dim=1), cache)
        return ids

    def test_larger_storage_is_taken_when_a_turn_does_not_fit(self, model, caplog):
        expected = self.conversation(model, ShiftKVCache(model, budget=9), generate)
        cache = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS)
        with caplog.at_level(logging.WARNING, logger="mmshiftkv"):
            assert self.conversation(model, cache, compiled).equal(expected)
        assert [record.message for record in caplog.records if "larger" in record.message or "slots" in record.message]
        assert graphs() == 2  # the second with any number of slots
        assert cache.report().tokens_stored == 9 + cache.get_seq_length() - 40

    def test_a_turn_that_fits_stays_in_place(self, model):
        cache = ShiftKVCache(model, budget=9, max_new_tokens=100)
        ids = compiled(model, models.prompt_ids(), cache)
        before = addresses(cache)
        compiled(model, torch.cat([ids, models.prompt_ids(1, 15)], dim=1), cache)
        assert addresses(cache) == before
        assert graphs() == 1

    def test_one_prompt_and_several_questions(self, model):
        """Copies answer as a fresh cache does, one after another in the same storage."""
        shared = prefill(model, ShiftKVCache(model, budget=9, max_new_tokens=30), models.prompt_ids())
        kept = [layer.keys.clone() for layer in shared.layers]
        places = []
        for tokens in (3, 7, 5):
            question = torch.cat([models.prompt_ids(), models.prompt_ids(1, tokens, seed=tokens)], dim=1)
            growing = prefill(model, ShiftKVCache(model, budget=9), models.prompt_ids())
            twin = copy.deepcopy(shared)
            assert compiled(model, question, twin).equal(generate(model, question, growing))
            places.append(addresses(twin))
            assert not set(places[-1]) & set(addresses(shared))
            assert twin.layers[0].filled is twin.layers[2].filled
            del twin
            gc.collect()
        assert places[0] == places[1] == places[2]
        assert graphs() == 1
        assert shared.get_seq_length() == 40
        assert all(layer.keys.equal(old) for layer, old in zip(shared.layers, kept, strict=True))


class TestChanges:
    def test_crop(self, model):
        more = models.prompt_ids(1, 5)
        logits = []
        for room in (None, 8):
            cache = prefill(model, ShiftKVCache(model, budget=6, max_new_tokens=room), models.prompt_ids())
            prefill(model, cache, more)
            cache.crop(-3)
            assert cache.get_seq_length() == 42
            with torch.no_grad():
                logits.append(model(more[:, :1], past_key_values=cache, use_cache=True).logits)
            with pytest.raises(ValueError, match="only 3 tokens can be removed, the prompt before them is compressed"):
                cache.crop(-4)
            with pytest.raises(ValueError, match="must be negative"):
                cache.crop(1)
            assert cache.get_seq_length() == 43
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)

    def test_crop_of_everything_empties_the_cache(self, model):
        cache = prefill(model, ShiftKVCache(model, budget=40, max_new_tokens=3), models.prompt_ids())
        cache.crop(-15)
        assert cache.kept_indices(1).equal(torch.arange(25).expand(1, 2, -1))
        cache.crop(-25)
        assert cache.get_seq_length() == 0
        assert cache.kept_indices(0) is None
        prefill(model, cache, models.prompt_ids(1, 50))
        assert cache.kept_indices(0).shape[-1] == 40

    def test_rows(self, model):
        for change in (
            lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
            lambda cache: cache.batch_select_indices(torch.tensor([1])),
            lambda cache: cache.batch_repeat_interleave(2),
        ):
            logits = []
            for room in (None, 4):
                cache = prefill(model, ShiftKVCache(model, budget=6, max_new_tokens=room), models.prompt_ids(2))
                change(cache)
                rows = cache.layers[0].keys.shape[0]
                assert cache.kept_indices(0).shape[0] == rows
                with torch.no_grad():
                    logits.append(model(models.prompt_ids(rows, 1), past_key_values=cache, use_cache=True).logits)
            torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)

    def test_another_batch_size_is_refused(self, model):
        cache = prefill(model, ShiftKVCache(model, budget=6, max_new_tokens=4), models.prompt_ids(2))
        with pytest.raises(ValueError, match="batch size 3, the cache holds 2 rows"):
            prefill(model, cache, models.prompt_ids(3, 1))


class TestWhatStaysEager:
    def test_assisted_decoding(self, model):
        inputs = {"input_ids": models.prompt_ids(1, 10).repeat(1, 5)}
        cache = ShiftKVCache(model, budget=1.0, max_new_tokens=NEW_TOKENS)
        assert cache.is_compileable
        found = generate(model, inputs, cache, prompt_lookup_num_tokens=6)
        assert not cache.is_compileable
        assert found.equal(generate(model, inputs, DynamicCache(config=model.config)))

    def test_attention_that_reads_all_slots(self, model):
        cache = prefill(model, ShiftKVCache(model, budget=6, max_new_tokens=4), models.prompt_ids())
        model.config._attn_implementation = "flex_attention"
        with pytest.warns(UserWarning, match="attn_implementation='flex_attention' would read slots"):
            assert not ShiftKVCache(model, budget=6, max_new_tokens=4).is_compileable
        with pytest.raises(ValueError, match="'flex_attention' was set after the cache was built"):
            cache.get_mask_sizes(1, 0)
