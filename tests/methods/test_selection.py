import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import method
from mmshiftkv import refit_values, select_tokens


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


def random_values(keys, head_dim=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(*keys.shape[:3], 1, generator=generator) + 0.1
    return torch.randn(*keys.shape[:3], head_dim, generator=generator) * lengths


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kv_heads=st.sampled_from([1, 2, 4]),
    shared=st.sampled_from([1, 2, 7]),
    tokens=st.integers(1, 60),
    budget=st.integers(1, 70),
    head_dim=st.sampled_from([8, 40, 64]),
    last_query_weight=st.sampled_from([0.0, 1.0, 4.0]),
    padding=st.integers(0, 59),
)
def test_with_values_it_agrees_with_the_float64_statement(
    seed, kv_heads, shared, tokens, budget, head_dim, last_query_weight, padding
):
    proxies, last, keys = inputs(seed, 2, kv_heads * shared, kv_heads, 5, tokens, head_dim)
    values = random_values(keys)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, : min(padding, tokens - 1)] = False
    arguments = {"budget": budget, "scaling": 0.25, "last_query_weight": last_query_weight}
    kept = select_tokens(proxies, last, keys, values=values, valid=valid, **arguments)
    assert kept.dtype == torch.int64
    assert kept.shape == (2, kv_heads, min(budget, tokens))
    method.assert_selects(
        kept.numpy(),
        *(part.numpy() for part in (proxies, last, keys)),
        values=values.numpy(),
        valid=valid.numpy(),
        **arguments,
    )


@pytest.mark.parametrize("padding", [0, 18, 25])
@pytest.mark.parametrize("ridge", [0.3, 3.0])
def test_refitted_values_are_those_of_the_float64_statement(padding, ridge):
    proxies, last, keys = inputs(spread=1.0)
    values, valid = random_values(keys), torch.arange(30) >= torch.tensor([[0], [padding]])
    kept = select_tokens(proxies, last, keys, values=values, budget=8, valid=valid)
    found = refit_values(proxies, keys, values, kept, ridge=ridge, steps=30, valid=valid)
    assert found.shape == (2, 2, 8, 24)
    for row, head in np.ndindex(2, 2):
        given = (proxies[row, 2 * head : 2 * head + 2], keys[row, head], values[row, head])
        arrays = (part.numpy().astype(np.float64) for part in given)
        refit = method.Refit.of(*arrays, kept[row, head].tolist(), valid[row].numpy(), method.Logits(0.25), ridge)
        np.testing.assert_allclose(found[row, head].numpy(), refit.values(), rtol=1e-3, atol=1e-4)


def test_refitted_values_come_in_the_dtype_of_the_values():
    proxies, last, keys = (part.bfloat16() for part in inputs())
    values = random_values(keys).bfloat16()
    kept = select_tokens(proxies, last, keys, values=values, budget=8)
    found = refit_values(proxies, keys, values, kept)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_a_penalty_without_end_leaves_the_values_as_they_are():
    proxies, last, keys = inputs()
    values = random_values(keys)
    kept = select_tokens(proxies, last, keys, values=values, budget=8)
    plain = values.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, 24))
    torch.testing.assert_close(refit_values(proxies, keys, values, kept, ridge=1e12), plain)


def test_kept_tokens_that_are_all_of_them_have_nothing_to_make_up_for():
    proxies, _, keys = inputs()
    values, kept = random_values(keys), torch.arange(30).expand(2, 2, -1)
    torch.testing.assert_close(refit_values(proxies, keys, values, kept), values)


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
        ({"num_groups": None}, TypeError, "num_groups is missing: .*; without votes give values"),
        ({"values": torch.zeros(2, 2, 29, 16)}, ValueError, r"values has shape \(2, 2, 29, 16\), must be \(2, 2, 30\)"),
        ({"values": torch.zeros(2, 2, 30)}, ValueError, r"values has shape \(2, 2, 30\), must have 4 dimensions"),
        ({"values": torch.zeros(2, 2, 30, 16).half()}, ValueError, "values is torch.float16 .* torch.float32"),
        ({"last_query_weight": -1.0}, ValueError, "last_query_weight=-1.0 must be a finite number >= 0"),
        ({"last_query_weight": "1"}, TypeError, "last_query_weight='1'"),
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


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ridge": 0.0}, ValueError, "ridge=0.0 must be a finite number > 0"),
        ({"ridge": float("nan")}, ValueError, "ridge=nan"),
        ({"ridge": "3"}, TypeError, "ridge='3'"),
        ({"steps": 0}, ValueError, "steps=0 must be an int >= 1"),
        ({"steps": 2.0}, TypeError, "steps=2.0"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ({"queries": torch.zeros(2, 3, 8, 16)}, ValueError, "keys has 2 heads, must have a divisor of the 3 heads"),
        ({"queries": torch.zeros(2, 4, 8, 8)}, ValueError, r"keys has shape \(2, 2, 30, 16\)"),
        ({"keys": torch.zeros(2, 2, 30)}, ValueError, r"keys has shape \(2, 2, 30\)"),
        ({"values": torch.zeros(2, 2, 29, 16)}, ValueError, r"values has shape \(2, 2, 29, 16\)"),
        ({"values": torch.zeros(2, 2, 30, 16).half()}, (TypeError, ValueError), "values"),
        ({"kept": torch.zeros(2, 3, 4, dtype=torch.int64)}, ValueError, r"kept has shape \(2, 3, 4\)"),
        ({"kept": torch.zeros(2, 2, 4)}, (TypeError, ValueError), "kept"),
        ({"valid": torch.ones(2, 29, dtype=torch.bool)}, ValueError, r"valid is .*\(2, 29\).*\(2, 30\)"),
        ({"valid": torch.arange(30).expand(2, -1) < 28}, ValueError, "row 0 has padding on the right"),
    ],
)
def test_bad_input_of_a_refit_is_named(changes, error, words):
    queries, _, keys = inputs()
    kept = torch.arange(26, 30).expand(2, 2, -1)
    arguments = {"queries": queries, "keys": keys, "values": random_values(keys), "kept": kept, **changes}
    with pytest.raises(error, match=words):
        refit_values(**arguments)
