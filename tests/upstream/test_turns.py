"""A cache that holds something already: later turns, copies, prompts prefilled before `generate`, more rows."""

import copy
import functools
import pickle

import pytest
import torch

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
from mmshiftkv import ShiftKVCache

BUDGET, TOKENS, TURN = 7, 24, 5


def conversation(model, cache, second):
    """Two turns; `second` makes the second turn's inputs of the model, the first answer and the new tokens."""
    first = generate(model, cache, models.prompt_ids(1, TOKENS)).sequences
    return generate(model, cache, second(model, first, models.prompt_ids(1, TURN, seed=5)))


def whole_mask(answer):
    # Without one `generate` would take tokens of the answer that happen to be padding tokens for padding.
    return torch.ones(1, answer.shape[1] + TURN, dtype=torch.long)


def all_ids(model, answer, turn):
    return {"input_ids": torch.cat([answer, turn], dim=1), "attention_mask": whole_mask(answer)}


def new_ids(model, answer, turn):
    # The answer's last token has not been fed yet.
    return {"input_ids": torch.cat([answer[:, -1:], turn], dim=1), "attention_mask": whole_mask(answer)}


def all_embeddings(model, answer, turn):
    return {"inputs_embeds": model.get_input_embeddings()(torch.cat([answer, turn], dim=1))}


@functools.cache
def answer_to_two_turns(family, budget):
    """Of a DynamicCache, without a budget."""
    model = model_of(family)
    return conversation(model, dynamic(model) if budget is None else ShiftKVCache(model, budget=budget), all_ids)


SECOND_TURNS = {"all-ids": all_ids, "new-ids-and-mask": new_ids, "all-embeddings": all_embeddings}
SEEN = TOKENS + 2 * NEW_TOKENS + TURN - 1


@pytest.mark.parametrize("second", SECOND_TURNS)
@pytest.mark.parametrize(("family", "storage"), FAMILIES_AND_STORAGES)
class TestSecondTurn:
    def test_a_covering_budget_does_as_a_dynamic_cache(self, family, storage, second):
        model, cache = model_of(family), covering(model_of(family), storage)
        expected = answer_to_two_turns(family, None)
        found = conversation(model, cache, SECOND_TURNS[second])
        assert found.sequences[:, -NEW_TOKENS:].equal(expected.sequences[:, -NEW_TOKENS:])
        assert_same(found.logits, expected.logits, storage)
        assert cache.get_seq_length() == SEEN

    def test_a_small_budget_answers_the_same_however_it_is_asked(self, family, storage, second):
        model = model_of(family)
        expected = answer_to_two_turns(family, BUDGET)
        cache = ShiftKVCache(model, budget=BUDGET, **STORAGES[storage])
        found = conversation(model, cache, SECOND_TURNS[second])
        assert found.sequences[:, -NEW_TOKENS:].equal(expected.sequences[:, -NEW_TOKENS:])
        assert_same(found.logits, expected.logits, storage)
        assert int(cache.get_seq_length()) == SEEN
        index = next(index for index in range(len(cache)) if cache.kept_indices(index) is not None)
        assert cache.layers[index].stored == BUDGET + SEEN - TOKENS


@pytest.mark.parametrize(("family", "storage"), FAMILIES_AND_STORAGES)
def test_the_same_prompt_again_after_reset(family, storage):
    model = model_of(family)
    for budget in (BUDGET, 1.0):
        cache = ShiftKVCache(model, budget=budget, **STORAGES[storage])
        first = generate(model, cache, models.left_padded([TOKENS, 13]))
        cache.reset()
        again = generate(model, cache, models.left_padded([TOKENS, 13]))
        assert again.sequences.equal(first.sequences)
        assert_same(again.logits, first.logits)


class TestPrefilledBefore:
    """The prompt is in the cache, but for its last token, when `generate` is called with all of it."""

    @pytest.mark.parametrize(("family", "storage"), FAMILIES_AND_STORAGES)
    def test_a_covering_budget_does_as_a_dynamic_cache(self, family, storage):
        model, ids = model_of(family), models.prompt_ids(2, TOKENS)
        found, expected = (
            generate(model, filled(model, cache, ids[:, :-1]), ids)
            for cache in (covering(model, storage), dynamic(model))
        )
        assert found.sequences.equal(expected.sequences)
        assert_same(found.logits, expected.logits, storage)

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("budget", [BUDGET, 1.0])
    def test_copies_of_one_prompt_answer_several_questions(self, budget, storage):
        model, ids = model_of("llama"), models.prompt_ids(1, TOKENS)
        shared = filled(model, ShiftKVCache(model, budget=budget, **STORAGES[storage]), ids)
        before = contents(shared)
        for seed in (5, 6):
            question = torch.cat([ids, models.prompt_ids(1, TURN, seed=seed)], dim=1)
            fresh = filled(model, ShiftKVCache(model, budget=budget), ids)
            fresh.end_prompt()
            expected = generate(model, fresh, question)
            found = generate(model, copy.deepcopy(shared), question)
            assert found.sequences.equal(expected.sequences)
            assert_same(found.logits, expected.logits, storage)
        assert_same(contents(shared), before)
        assert shared.get_seq_length() == TOKENS

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True, "top_k": 20}])
    @pytest.mark.parametrize("budget", [BUDGET, 1.0])
    def test_one_row_becomes_several(self, budget, mode, storage):
        """A DynamicCache has to be repeated by hand before; ours take the rows as they come."""
        model, ids = model_of("llama"), models.prompt_ids(1, TOKENS)
        repeated = filled(model, ShiftKVCache(model, budget=budget), ids[:, :-1])
        repeated.batch_repeat_interleave(3)
        expected = generate(model, repeated, ids, **mode)
        cache = filled(model, ShiftKVCache(model, budget=budget, **STORAGES[storage]), ids[:, :-1])
        found = generate(model, cache, ids, **mode)
        assert found.sequences.equal(expected.sequences)
        assert_same(found.logits, expected.logits, storage)
        assert cache.kept_indices(0).shape[0] == 3

    def test_two_rows_do_not_become_three(self):
        model = model_of("llama")
        cache = filled(model, ShiftKVCache(model, budget=BUDGET), models.prompt_ids(2, TOKENS))
        with pytest.raises(ValueError, match="batch size 3, the cache holds 2 rows"):
            forward(model, cache, models.prompt_ids(3, 1))


class TestWherePromptsEnd:
    """A forward pass that no `generate` makes says nothing of itself: the cache's settings tell a turn from a chunk."""

    @pytest.mark.parametrize("storage", STORAGES)
    def test_a_second_pass_after_a_single_one_is_a_turn(self, storage):
        model, ids, turn = model_of("llama"), models.prompt_ids(1, TOKENS), models.prompt_ids(1, TURN, seed=5)
        cache = filled(model, ShiftKVCache(model, budget=BUDGET, **STORAGES[storage]), ids)
        told = filled(model, ShiftKVCache(model, budget=BUDGET, **STORAGES[storage]), ids)
        told.end_prompt()
        found, expected = (forward(model, each, turn).logits for each in (cache, told))
        assert_same(found, expected)
        assert cache.get_seq_length() == TOKENS + TURN
        assert cache.layers[0].stored == BUDGET + TURN
        assert cache.kept_indices(0).equal(told.kept_indices(0))

    @pytest.mark.parametrize("storage", STORAGES)
    def test_passes_after_a_prompt_that_is_stored_whole_do_as_with_a_dynamic_cache(self, storage):
        model, ids = model_of("llama"), models.prompt_ids(1, TOKENS)
        cache, plain = covering(model, storage), dynamic(model)
        for part in ids.split([9, 9, 6], dim=1):
            found, expected = (forward(model, each, part).logits for each in (cache, plain))
        assert_same(found, expected, storage)

    def test_chunks_end_with_end_prompt(self):
        model, ids = model_of("llama"), models.prompt_ids(1, TOKENS)
        cache = ShiftKVCache(model, budget=BUDGET, prefill="chunked")
        for part in ids.split(10, dim=1):
            forward(model, cache, part)
        with pytest.raises(ValueError, match=r"end_prompt\(\)"):
            forward(model, cache, models.prompt_ids(1, 1))
        assert cache.kept_indices(0) is None
        cache.end_prompt()
        whole = filled(model, ShiftKVCache(model, budget=BUDGET), ids)
        assert cache.kept_indices(0).equal(whole.kept_indices(0))
        found, expected = (forward(model, each, models.prompt_ids(1, 1)).logits for each in (cache, whole))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class TestAssistedTurns:
    """Assisted decoding feeds all ids that it is given, whatever a cache holds: a second turn is refused."""

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("first", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "assisted"])
    @pytest.mark.parametrize("second", [all_ids, new_ids])
    def test_a_second_turn_is_refused(self, second, first, storage):
        model = model_of("llama")
        cache = ShiftKVCache(model, budget=BUDGET, **STORAGES[storage])
        answer = generate(model, cache, models.prompt_ids(1, TOKENS), **first).sequences
        turn = second(model, answer, models.prompt_ids(1, TURN, seed=5))
        with pytest.raises(ValueError, match=r"call reset\(\)"):
            generate(model, cache, turn, prompt_lookup_num_tokens=3)

    @pytest.mark.parametrize("storage", STORAGES)
    def test_without_assistance_it_goes_on(self, storage):
        model = model_of("llama")
        cache = ShiftKVCache(model, budget=BUDGET, **STORAGES[storage])
        answer = generate(model, cache, models.prompt_ids(1, TOKENS), prompt_lookup_num_tokens=3).sequences
        found = generate(model, cache, all_ids(model, answer, models.prompt_ids(1, TURN, seed=5)))
        assert found.sequences.shape == (1, TOKENS + 2 * NEW_TOKENS + TURN)
        assert cache.get_seq_length() == SEEN


@pytest.mark.parametrize("settings", [{}, {"max_new_tokens": NEW_TOKENS}, {"prefill": "chunked"}])
@pytest.mark.parametrize("holds_a_prompt", [False, True])
def test_no_cache_can_be_pickled_and_every_cache_can_be_copied(settings, holds_a_prompt):
    model = model_of("llama")
    cache = ShiftKVCache(model, budget=BUDGET, **settings)
    if holds_a_prompt:
        filled(model, cache, models.prompt_ids())
    with pytest.raises(TypeError, match=r"copy\.deepcopy"):
        pickle.dumps(cache)
    assert copy.deepcopy(cache).get_seq_length() == (40 if holds_a_prompt else 0)


class TestMasks:
    """What only a prompt that is stored whole can have, since nothing of it is selected."""

    def right_padded(self):
        mask = (torch.arange(TOKENS)[None] < torch.tensor([[TOKENS], [15]])).long()
        return models.prompt_ids(2, TOKENS) * mask, mask

    def ready_made(self):
        return models.prompt_ids(2, TOKENS), torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("kind", ["right_padded", "ready_made"])
    @pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "mixtral"])
    def test_a_covering_budget_takes_them(self, family, kind, storage):
        model = model_of(family)
        ids, mask = getattr(self, kind)()
        cache, plain = covering(model, storage), dynamic(model)
        found, expected = (forward(model, each, ids, attention_mask=mask).logits for each in (cache, plain))
        assert_same(found, expected)
        assert_same(contents(cache), contents(plain))
        assert cache.get_seq_length() == TOKENS
        if kind == "ready_made":
            found, expected = (forward(model, each, models.prompt_ids(2, 1)).logits for each in (cache, plain))
            assert_same(found, expected, storage)

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("kind", ["right_padded", "ready_made"])
    def test_a_small_budget_refuses_them(self, kind, storage):
        model, cache = model_of("llama"), None
        ids, mask = getattr(self, kind)()
        cache = ShiftKVCache(model, budget=BUDGET, **STORAGES[storage])
        with pytest.raises(ValueError, match="attention_mask"):
            forward(model, cache, ids, attention_mask=mask)
        assert models.hooks_on(model) == 0
