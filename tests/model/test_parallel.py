"""Which heads a rank has of a model that several processes share."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from mmshiftkv.model.parallel import Rank, SharedHeads, local_part, rank_of


def heads(count, *rank):
    return SharedHeads.of(SimpleNamespace(num_key_value_heads=count), Rank(*rank) if rank else None)


@given(st.integers(1, 8), st.integers(2, 8))
def test_the_ranks_have_each_head_once(held, ranks):
    places = [heads(held * ranks, index, ranks).place(held) for index in range(ranks)]
    assert {together for _, together in places} == {held * ranks}
    assert [first + head for first, _ in places for head in range(held)] == list(range(held * ranks))


@pytest.mark.parametrize("known", [heads(4), heads(4, 1, 2), heads(None, 1, 2)])
def test_who_has_all_heads_has_the_first(known):
    assert known.place(4) == (0, 4)


@given(st.integers(1, 64), st.integers(2, 64))
def test_heads_are_shared_evenly_or_not_at_all(count, ranks):
    obstacle = heads(count, 0, ranks).obstacle
    assert (obstacle is None) == (count % ranks == 0)
    assert obstacle is None or f"its {count} KV heads cannot be shared evenly between {ranks} processes" in obstacle


def test_a_model_of_one_process_has_no_rank():
    assert rank_of(models.text_model()) is None
    assert heads(3).obstacle is None
    tensor = torch.ones(2)
    assert local_part(tensor) is tensor
