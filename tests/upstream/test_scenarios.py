"""What layers hold, number by number, update after update.

The prompt comes from a model, so that a cache selects from it; then what is held of it is written over with the numbers
1.0, 2.0, ... (values: their negatives), and everything else that a scenario shows is a list of such numbers.
"""

import copy

import pytest
import torch

import models
from caches import filled
from mmshiftkv import ShiftKVCache

PROMPT, BUDGET, ROOM = 9, 3, 4


@pytest.fixture(scope="module")
def model():
    return models.text_model(num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=2)


def states(*numbers, rows=1):
    """Keys (rows, 1, tokens, 2) with these numbers; those of row r are r * 100 larger."""
    row = torch.tensor(numbers, dtype=torch.float32) + 100 * torch.arange(rows)[:, None]
    keys = row[:, None, :, None].expand(-1, -1, -1, 2)
    return keys, -keys


def held(cache, layer=0, row=0):
    """The numbers that a layer holds in one row; with fixed storage, in all its slots."""
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    assert values.equal(-keys)
    return keys[row, 0, :, 0].tolist()


def numbered(model, rows=1, layers=2, **settings):
    """A cache that holds the numbers 1, 2 and 3 of a prompt of nine tokens, in all layers."""
    cache = filled(model, ShiftKVCache(model, budget=BUDGET, **settings), models.prompt_ids(rows, PROMPT))
    for layer in cache.layers:
        for part, numbers in zip((layer.keys, layer.values), states(1.0, 2.0, 3.0, rows=rows), strict=True):
            part[:, :, :BUDGET] = numbers
    return cache


def append(cache, *numbers, rows=1):
    """Updates both layers; what the first returns is what attention sees."""
    first, _ = (cache.update(*states(*numbers, rows=rows), layer) for layer in (0, 1))
    return first[0][0, 0, :, 0].tolist()


class TestGrowing:
    def test_append(self, model):
        """
        prompt:          [1, 2, 3]
        append 4:        [1, 2, 3, 4]
        append 5, 6, 7:  [1, 2, 3, 4, 5, 6, 7]
        """
        cache = numbered(model)
        assert held(cache) == [1.0, 2.0, 3.0]
        assert append(cache, 4.0) == held(cache) == [1.0, 2.0, 3.0, 4.0]
        assert append(cache, 5.0, 6.0, 7.0) == held(cache) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        assert cache.get_seq_length() == PROMPT + 4

    def test_append_beyond_the_first_growth(self, model):
        """One hundred tokens one by one, then a hundred at once: storage grows, and nothing moves out of order."""
        cache = numbered(model)
        for number in range(4, 104):
            append(cache, float(number))
        append(cache, *map(float, range(104, 204)))
        assert held(cache) == held(cache, layer=1) == [float(number) for number in range(1, 204)]

    def test_crop(self, model):
        """
        append 4, 5, 6:  [1, 2, 3, 4, 5, 6]
        crop 2:          [1, 2, 3, 4]
        append 7:        [1, 2, 3, 4, 7]
        crop 2:          [1, 2, 3]
        crop 1:          refused, [1, 2, 3]
        """
        cache = numbered(model)
        append(cache, 4.0, 5.0, 6.0)
        cache.crop(-2)
        assert held(cache) == [1.0, 2.0, 3.0, 4.0]
        append(cache, 7.0)
        assert held(cache) == [1.0, 2.0, 3.0, 4.0, 7.0]
        cache.crop(-2)
        with pytest.raises(ValueError, match="only 0 tokens can be removed"):
            cache.crop(-1)
        assert held(cache) == held(cache, layer=1) == [1.0, 2.0, 3.0]
        assert cache.get_seq_length() == PROMPT

    def test_rows(self, model):
        """
        two rows:            [1, 2, 3], [101, 102, 103]
        reorder 1, 0:        [101, ...], [1, ...]
        repeat 2:            [101, ...], [101, ...], [1, ...], [1, ...]
        append 4:            [101, 102, 103, 4], [.., 104], [1, 2, 3, 204], [.., 304]
        select 0 and 2:      [101, 102, 103, 4], [1, 2, 3, 204]
        """
        cache = numbered(model, rows=2)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert [held(cache, row=row) for row in (0, 1)] == [[101.0, 102.0, 103.0], [1.0, 2.0, 3.0]]
        cache.batch_repeat_interleave(2)
        assert [held(cache, row=row)[0] for row in range(4)] == [101.0, 101.0, 1.0, 1.0]
        append(cache, 4.0, rows=4)
        cache.batch_select_indices(torch.tensor([0, 2]))
        for layer in (0, 1):
            assert held(cache, layer, row=0) == [101.0, 102.0, 103.0, 4.0]
            assert held(cache, layer, row=1) == [1.0, 2.0, 3.0, 204.0]

    def test_layers_hold_their_own_numbers(self, model):
        """
        layer 0, append 4:  [1, 2, 3, 4]
        layer 1, append 8:  [1, 2, 3, 8]
        """
        cache = numbered(model)
        cache.update(*states(4.0), 0)
        assert (held(cache), held(cache, layer=1)) == ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
        cache.update(*states(8.0), 1)
        assert (held(cache), held(cache, layer=1)) == ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 8.0])

    def test_copies_part(self, model):
        """
        append 4:            [1, 2, 3, 4]
        copy, append 5:      [1, 2, 3, 4, 5], the original [1, 2, 3, 4]
        original, append 6:  [1, 2, 3, 4, 6], the copy [1, 2, 3, 4, 5]
        """
        cache = numbered(model)
        append(cache, 4.0)
        copied = copy.deepcopy(cache)
        append(copied, 5.0)
        assert (held(cache), held(copied)) == ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0])
        append(cache, 6.0)
        assert (held(cache), held(copied)) == ([1.0, 2.0, 3.0, 4.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0])


class TestFixed:
    def test_append(self, model):
        """
        prompt:          [1, 2, 3, 0, 0, 0, 0]
        append 4:        [1, 2, 3, 4, 0, 0, 0]
        append 5, 6, 7:  [1, 2, 3, 4, 5, 6, 7]
        """
        cache = numbered(model, max_new_tokens=ROOM)
        assert held(cache) == [1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]
        assert append(cache, 4.0) == held(cache) == [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0]
        assert append(cache, 5.0, 6.0, 7.0) == held(cache) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        assert cache.get_seq_length() == PROMPT + ROOM

    def test_append_to_full_storage(self, model, caplog):
        """
        append 4, 5, 6, 7:  [1, 2, 3, 4, 5, 6, 7]
        append 8:           [1, 2, 3, 4, 5, 6, 7, 8, 0, ...], in larger storage, and a line in the log
        """
        cache = numbered(model, max_new_tokens=ROOM)
        for number in (4.0, 5.0, 6.0, 7.0):
            append(cache, number)
        assert not caplog.records
        append(cache, 8.0)
        for layer in (0, 1):
            slots = held(cache, layer)
            assert slots[:8] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
            assert len(slots) > 8
            assert set(slots[8:]) == {0.0}
        assert "larger" in caplog.text or "slots" in caplog.text
        assert cache.get_seq_length() == PROMPT + 5

    def test_crop(self, model):
        """
        append 4, 5, 6:  [1, 2, 3, 4, 5, 6, 0]
        crop 2, 7:       [1, 2, 3, 4, 7, 6, 0]: the 6 is in a slot that counts as empty
        append 8, 9:     [1, 2, 3, 4, 7, 8, 9]
        """
        cache = numbered(model, max_new_tokens=ROOM)
        append(cache, 4.0, 5.0, 6.0)
        cache.crop(-2)
        append(cache, 7.0)
        assert held(cache)[:5] == [1.0, 2.0, 3.0, 4.0, 7.0]
        assert [layer.stored for layer in cache.layers] == [5, 5]
        append(cache, 8.0, 9.0)
        assert held(cache) == held(cache, layer=1) == [1.0, 2.0, 3.0, 4.0, 7.0, 8.0, 9.0]

    def test_rows(self, model):
        """
        two rows:        [1, 2, 3, 0, ...], [101, 102, 103, 0, ...]
        reorder 1, 0:    [101, ...], [1, ...]
        repeat 2:        [101, ...], [101, ...], [1, ...], [1, ...]
        append 4:        [101, 102, 103, 4, 0, 0, 0], .., [1, 2, 3, 204, 0, 0, 0], ..
        select 0 and 2:  [101, 102, 103, 4, 0, 0, 0], [1, 2, 3, 204, 0, 0, 0]
        """
        cache = numbered(model, rows=2, max_new_tokens=ROOM)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        assert [held(cache, row=row)[0] for row in range(4)] == [101.0, 101.0, 1.0, 1.0]
        append(cache, 4.0, rows=4)
        cache.batch_select_indices(torch.tensor([0, 2]))
        for layer in (0, 1):
            assert held(cache, layer, row=0) == [101.0, 102.0, 103.0, 4.0, 0.0, 0.0, 0.0]
            assert held(cache, layer, row=1) == [1.0, 2.0, 3.0, 204.0, 0.0, 0.0, 0.0]

    def test_copies_part(self, model):
        """
        copy, append 4:      [1, 2, 3, 4, ...], the original [1, 2, 3, 0, ...]
        original, append 5:  [1, 2, 3, 5, ...], the copy [1, 2, 3, 4, ...]
        """
        cache = numbered(model, max_new_tokens=ROOM)
        copied = copy.deepcopy(cache)
        append(copied, 4.0)
        assert (held(cache)[:4], held(copied)[:4]) == ([1.0, 2.0, 3.0, 0.0], [1.0, 2.0, 3.0, 4.0])
        append(cache, 5.0)
        assert (held(cache)[:4], held(copied)[:4]) == ([1.0, 2.0, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0])

    def test_a_short_prompt_leaves_slots_of_its_budget(self, model):
        """A prompt of two tokens and a budget of three: [a, b, 0, 0, 0, 0, 0], then [a, b, 4, 0, 0, 0, 0]."""
        cache = filled(model, ShiftKVCache(model, budget=BUDGET, max_new_tokens=ROOM), models.prompt_ids(1, 2))
        before = cache.layers[0].keys[0, 0, :, 0].tolist()
        assert len(before) == BUDGET + ROOM
        assert before[2:] == [0.0] * 5
        assert append(cache, 4.0) == [*before[:2], 4.0, 0.0, 0.0, 0.0, 0.0]
