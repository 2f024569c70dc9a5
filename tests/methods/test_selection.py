import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import method
from mmshiftkv import select_tokens


def inputs(seed=0, batch=2, heads=4, kv_heads=2, proxies=8, tokens=30, head_dim=16, spread=2.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return spread * torch.randn(*shape, generator=generator)

    return (
        draw(batch, heads, proxies, head_dim),
        draw(batch, heads, 1, head_dim),
        draw(batch, kv_heads, tokens, head_dim),
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kv_heads=st.sampled_from([1, 2, 4]),
    shared=st.sampled_from([1, 2, 7]),
    groups=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 60),
    budget=st.integers(1, 70),
    head_dim=st.sampled_from([8, 40, 64]),
    mass=st.sampled_from([0.3, 0.9, 0.95]),
    padding=st.integers(0, 59),
)
def test_agrees_with_the_float64_statement_of_the_method(
    seed, kv_heads, shared, groups, tokens, budget, head_dim, mass, padding
):
    proxies, last, keys = inputs(seed, 2, kv_heads * shared, kv_heads, 2 * groups, tokens, head_dim)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, : min(padding, tokens - 1)] = False
    arguments = {"budget": budget, "num_groups": groups, "mass": mass, "scaling": 0.25}
    kept = select_tokens(proxies, last, keys, valid=valid, **arguments)
    assert kept.dtype == torch.int64
    assert kept.shape == (2, kv_heads, min(budget, tokens))
    method.assert_selects(
        kept.numpy(), *(part.numpy() for part in (proxies, last, keys)), valid=valid.numpy(), **arguments
    )


@pytest.mark.parametrize("budget", [1, 5, 29, 30, 31, 1000])
def test_keeps_the_budget_in_order_with_the_last_token(budget):
    kept = select_tokens(*inputs(), budget=budget, num_groups=4)
    assert kept.shape == (2, 2, min(budget, 30))
    assert (kept.diff(dim=-1) > 0).all()
    assert (kept[..., -1] == 29).all()


def test_scaling_defaults_to_that_of_the_head_dim():
    assert select_tokens(*inputs(), budget=7, num_groups=2).equal(
        select_tokens(*inputs(), budget=7, num_groups=2, scaling=16**-0.5)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_float32(dtype):
    halves = [part.to(dtype) for part in inputs(head_dim=64)]
    kept = select_tokens(*halves, budget=9, num_groups=4)
    assert kept.equal(select_tokens(*(part.float() for part in halves), budget=9, num_groups=4))


def test_a_row_does_not_depend_on_its_neighbours_or_its_padding():
    proxies, last, keys = inputs(batch=1, tokens=20)
    alone = select_tokens(proxies, last, keys, budget=6, num_groups=2)
    padded = torch.cat([torch.full((1, 2, 11, 16), 1e4), keys], dim=2)
    other_proxies, other_last, other_keys = inputs(seed=9, batch=1, tokens=31)
    together = select_tokens(
        torch.cat([proxies, other_proxies]),
        torch.cat([last, other_last]),
        torch.cat([padded, other_keys]),
        budget=6,
        num_groups=2,
        valid=torch.tensor([[False] * 11 + [True] * 20, [True] * 31]),
    )
    assert (together[:1] - 11).equal(alone)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"budget": 0}, ValueError, "budget=0"),
        ({"budget": 0.5}, TypeError, "budget=0.5"),
        ({"budget": True}, TypeError, "budget=True"),
        ({"num_groups": 3}, ValueError, "num_groups=3 must divide the 8 proxies"),
        ({"mass": 0.0}, ValueError, "mass=0.0"),
        ({"mass": float("nan")}, ValueError, "mass=nan"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'.*'torch'"),
        ({"valid": torch.ones(2, 29, dtype=torch.bool)}, ValueError, r"valid is .*\(2, 29\).*\(2, 30\)"),
        ({"valid": torch.ones(2, 30)}, ValueError, "valid is torch.float32"),
        ({"valid": torch.arange(30).expand(2, -1) < 28}, ValueError, "row 0 has padding on the right"),
        ({"valid": torch.arange(30).expand(2, -1) != 4}, ValueError, "row 0 has padding between tokens"),
        ({"valid": torch.zeros(2, 30, dtype=torch.bool)}, ValueError, "row 0 has nothing but padding"),
        ({"keys": torch.zeros(2, 3, 30, 16)}, ValueError, "keys has 3 heads"),
        ({"keys": torch.zeros(2, 2, 0, 16)}, ValueError, "keys has no tokens"),
        ({"keys": torch.zeros(2, 2, 30, 8)}, ValueError, r"keys has shape \(2, 2, 30, 8\)"),
        ({"keys": torch.zeros(2, 30, 16)}, ValueError, r"keys has shape \(2, 30, 16\)"),
        ({"keys": torch.zeros(2, 2, 30, 16, dtype=torch.bfloat16)}, ValueError, "proxy_queries is torch.float32"),
        ({"last_query": torch.zeros(2, 4, 2, 16)}, ValueError, "last_query has shape"),
    ],
)
def test_bad_input_is_named(changes, error, words):
    proxies, last, keys = inputs()
    arguments = {"proxy_queries": proxies, "last_query": last, "keys": keys, "budget": 4, "num_groups": 2, **changes}
    with pytest.raises(error, match=words):
        select_tokens(**arguments)
