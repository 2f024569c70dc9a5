"""In traced graphs the attention of one token is `attend_token`'s, where that means the same."""

import pytest
import torch
from by_blocks import ByBlocks
from test_blocks import WHOLE, answer, assert_same
from torch.nn.functional import scaled_dot_product_attention

import models
from mmshiftkv.decode.block_programs import use_token_kernels

REPLACED = torch.ops.mmshiftkv.attend_token.default


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def count(graph_module, target):
    return sum(node.target is target for node in graph_module.graph.nodes)


class Counting:
    """A backend that replaces, and counts what was replaced and what was left, expansions among it."""

    def __init__(self):
        self.replaced = self.left = self.expanded = 0

    def __call__(self, graph_module, example_inputs):
        use_token_kernels(graph_module)
        self.replaced += count(graph_module, REPLACED)
        self.left += count(graph_module, scaled_dot_product_attention)
        self.expanded += sum(node.target == "expand" for node in graph_module.graph.nodes)
        return graph_module


@pytest.mark.parametrize(
    ("name", "replaced"), [("llama", 1), ("llama-mha", 1), ("llama-mqa", 1), ("qwen3", 1), ("gemma3_text", 2)]
)
@pytest.mark.parametrize("rows", [1, 2])
def test_in_models(name, replaced, rows):
    model = models.text_model(name.split("-")[0], **models.HYBRIDS.get(name, models.SUPPORTED[name]))
    backend = Counting()
    inputs = models.left_padded([40, 17][:rows])
    assert_same(answer(model, inputs, ByBlocks(model, backend).options), answer(model, inputs, WHOLE))
    assert (backend.replaced, backend.left, backend.expanded) == (replaced, 0, 0)


def repeated(part, group):
    rows, heads, slots, head_dim = part.shape
    return part[:, :, None, :, :].expand(rows, heads, group, slots, head_dim).reshape(rows, -1, slots, head_dim)


def plain(query, keys, values, mask):
    return scaled_dot_product_attention(query, repeated(keys, 2), repeated(values, 2), attn_mask=mask)


def grouped(query, keys, values, mask):
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True, scale=0.5)


def written_later(query, keys, values, mask):
    """What has been repeated is what is read."""
    wide, wide_values = repeated(keys, 2), repeated(values, 2)
    keys.mul_(2)
    return scaled_dot_product_attention(query, wide, wide_values, attn_mask=mask)


def other_order(query, keys, values, mask):
    """Heads of a group apart from each other."""
    rows, heads, slots, head_dim = keys.shape
    wide = keys[:, None].expand(rows, 2, heads, slots, head_dim).reshape(rows, -1, slots, head_dim)
    return scaled_dot_product_attention(query, wide, repeated(values, 2), attn_mask=mask)


def dropout(query, keys, values, mask):
    return scaled_dot_product_attention(query, keys, values, mask, 0.0, enable_gqa=True)


def causal(query, keys, values, mask):
    return scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(
    ("function", "replaced"),
    [(plain, 1), (grouped, 1), (written_later, 1), (other_order, 0), (dropout, 0), (causal, 0)],
)
def test_functions(function, replaced):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 16, generator=generator)
    keys, values = (torch.randn(2, 2, 20, 16, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 1, 20, generator=generator) < 0.7
    expected = function(query, keys.clone(), values, mask)
    backend = Counting()
    with torch.no_grad():
        found = torch.compile(function, backend=backend, fullgraph=True)(query, keys.clone(), values, mask)
    torch.testing.assert_close(found, expected)
    assert (backend.replaced, backend.left) == (replaced, 1 - replaced)


@pytest.mark.parametrize(
    ("shapes", "mask", "options"),
    [
        ({"tokens": 2}, (2, 1, 1, 20), {}),
        ({"slots": 1025}, (2, 1, 1, 1025), {}),
        ({"rows": 17}, (17, 1, 1, 20), {}),
        ({}, (2, 4, 1, 20), {}),
        ({"dtype": torch.float64}, (2, 1, 1, 20), {}),
        ({}, (2, 1, 1, 20), {"requires_grad": True}),
    ],
    ids=["two tokens", "many slots", "many rows", "a mask for each head", "another dtype", "gradients"],
)
def test_what_is_left_alone(shapes, mask, options):
    rows, tokens, slots = (shapes.get(name, size) for name, size in (("rows", 2), ("tokens", 1), ("slots", 20)))
    query = torch.randn(rows, 4, tokens, 16, dtype=shapes.get("dtype"), **options)
    keys = torch.randn(rows, 2, slots, 16, dtype=shapes.get("dtype"))
    given = query, keys, keys.clone(), torch.ones(mask, dtype=torch.bool)
    backend = Counting()
    found = torch.compile(plain, backend=backend, fullgraph=True)(*given)
    torch.testing.assert_close(found, plain(*given))
    assert (backend.replaced, backend.left) == (0, 1)
