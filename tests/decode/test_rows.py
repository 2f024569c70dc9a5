"""Decoding block by block with one row after another number of rows: which graphs there are, and what is in them."""

from collections import Counter

import pytest
import torch
from by_blocks import ByBlocks
from test_blocks import NEW_TOKENS, answer, assert_same, build
from torch.nn.functional import linear, scaled_dot_product_attention

import models
from mmshiftkv.decode.block_programs import use_token_kernels

PROJECT, ATTEND = torch.ops.mmshiftkv.project_token.default, torch.ops.mmshiftkv.attend_token.default
GATE = torch.ops.mmshiftkv.project_gate.default
# Queries, keys and values, the output, gate and up, down: four launches in place of seven layers.
REPLACED, LEFT = {PROJECT: 4, ATTEND: 1}, {linear: 7, scaled_dot_product_attention: 1}
WITH_GATE = {PROJECT: 3, GATE: 1, ATTEND: 1}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recording:
    """A backend that takes the kernels, and keeps how many projections and attentions of each sort a graph has."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, example_inputs):
        use_token_kernels(graph_module)
        found = Counter(node.target for node in graph_module.graph.nodes)
        self.graphs.append({target: found[target] for target in (PROJECT, GATE, ATTEND, *LEFT) if found[target]})
        return graph_module


class Rows:
    """Answers of one model with any number of rows and slots, each compared with that of plain `generate`."""

    def __init__(self, name):
        self.model, self.backend = build(name), Recording()
        self.blocks = ByBlocks(self.model, self.backend)

    def answer(self, rows, budget=9, room=NEW_TOKENS):
        """The graphs that these answers needed besides those that were there."""
        known = len(self.backend.graphs)
        inputs = models.left_padded([40 - row for row in range(rows)])
        found = answer(self.model, inputs, self.blocks.options, budget=budget, room=room)
        assert_same(found, answer(self.model, inputs, {}, budget=budget, room=room))
        return self.backend.graphs[known:]


@pytest.mark.parametrize(("name", "kinds", "of_one"), [("llama", 1, WITH_GATE), ("gemma3_text", 2, REPLACED)])
def test_up_to_sixteen_rows_use_the_kernels_and_two_graphs_of_each_kind_of_block(name, kinds, of_one):
    rows = Rows(name)
    assert rows.answer(1) == kinds * [of_one]
    assert rows.answer(8) == kinds * [REPLACED]  # for several rows
    for several in (4, 2, 16, 1):
        assert rows.answer(several) == []
    assert rows.answer(20) == kinds * [LEFT]
    assert rows.answer(1) == rows.answer(3) == []


def test_slots_may_vary_too():
    rows = Rows("llama")
    assert rows.answer(1) == rows.answer(1, budget=20) == [WITH_GATE]
    assert rows.answer(5, budget=20) == [REPLACED]
    for several, budget in ((5, 30), (1, 14), (12, 9)):
        assert rows.answer(several, budget) == []


def test_rows_and_slots_of_all_sorts_are_not_too_many():
    """torch compiles a function eight times, and refuses to do so once more."""
    rows, graphs = Rows("llama"), []
    for room in (NEW_TOKENS, 20, 1100):
        for several in (8, 1, 4, 20):
            graphs += rows.answer(several, room=room)
    of_many_slots = [
        {scaled_dot_product_attention if target is ATTEND else target: count for target, count in graph.items()}
        for graph in (WITH_GATE, REPLACED)
    ]
    assert [graphs.count(graph) for graph in (WITH_GATE, REPLACED, *of_many_slots, LEFT)] == [2, 3, 1, 1, 2]
