import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import method
from shiftkv_kernels import reference


def random_inputs(seed: int, batch=2, heads=4, kv_heads=2, proxies=8, tokens=23, head_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, proxies, head_dim), (batch, heads, 1, head_dim), (batch, kv_heads, tokens, head_dim)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (7, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_group_mass_is_the_mean_attention_of_each_group_and_the_last_query(heads, kv_heads, padded):
    proxies, last, keys = random_inputs(0, heads=heads, kv_heads=kv_heads)
    valid = torch.ones(2, 23, dtype=torch.bool)
    valid[1, :6] = not padded
    mass, last_mass = reference.group_mass(
        proxies, last, keys, num_groups=4, scaling=0.3, valid=valid if padded else None
    )
    shared = heads // kv_heads
    for row in range(2):
        for head in range(kv_heads):
            arrays = [part[row, head * shared : (head + 1) * shared].double().numpy() for part in (proxies, last)] + [
                keys[row, head].double().numpy(),
                valid[row].numpy(),
            ]
            by_proxy = method.attention_mass(arrays[0], arrays[2], arrays[3], method.Logits(0.3))
            by_last = method.attention_mass(arrays[1], arrays[2], arrays[3], method.Logits(0.3))[0]
            expected = (by_proxy.reshape(4, 2, -1).sum(axis=1) + by_last) / 3
            np.testing.assert_allclose(mass[row, head].numpy(), expected, atol=1e-6)
            np.testing.assert_allclose(last_mass[row, head].numpy(), by_last, atol=1e-6)
    assert mass.shape == (2, kv_heads, 4, 23)
    assert mass.dtype == last_mass.dtype == torch.float32
    if padded:
        assert mass[1, :, :, :6].eq(0).all()


def test_the_mass_of_even_attention_is_all_but_the_last_tokens_share():
    proxies, last, keys = random_inputs(1)
    mass, _ = reference.group_mass(proxies * 0, last * 0, keys, num_groups=2, scaling=1.0)
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 2, 2), 22 / 23))


def test_votes_are_the_minimal_sets_that_reach_the_mass():
    mass = torch.tensor([[[[0.5, 0.2, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 0.97, 0.03]]]])
    assert reference.vote(mass, 0.7).tolist() == [[[1, 1, 0, 1, 0]]]
    assert reference.vote(mass, 0.71).tolist() == [[[1, 1, 1, 1, 0]]]
    assert reference.vote(mass, 0.4).tolist() == [[[1, 0, 0, 1, 0]]]


def test_a_group_always_votes_and_never_for_a_token_without_mass():
    mass = torch.tensor([[[[0.0, 1.0, 0.0]]]])
    assert reference.vote(mass, 1.0).tolist() == [[[0, 1, 0]]]
    assert reference.vote(mass, 0.01).tolist() == [[[0, 1, 0]]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 40),
    groups=st.integers(1, 5),
    sixteenths=st.integers(1, 16),
)
def test_votes_agree_with_the_loop_over_sorted_tokens(seed, tokens, groups, sixteenths):
    # Sums and products of such fractions are exact, and there are ties.
    threshold = sixteenths / 16
    counts = torch.randint(0, 8, (1, 1, groups, tokens), generator=torch.Generator().manual_seed(seed))
    mass = counts.float() / 64
    expected = np.zeros(tokens)
    for group in mass[0, 0].double().numpy():
        expected[sorted(method.votes_of(group, threshold))] += 1
    assert reference.vote(mass, threshold)[0, 0].tolist() == expected.tolist()


def test_the_last_token_is_kept_whatever_its_score():
    scores = torch.tensor([[[5.0, 4.0, 3.0, 0.0]]])
    assert reference.keep_best(scores, 1).tolist() == [[[3]]]
    assert reference.keep_best(scores, 3).tolist() == [[[0, 1, 3]]]
    assert reference.keep_best(scores, 4).tolist() == [[[0, 1, 2, 3]]]


def test_of_equal_scores_the_earlier_token_is_kept():
    assert reference.keep_best(torch.ones(1, 1, 9), 4).tolist() == [[[0, 1, 2, 8]]]


def test_a_row_shorter_than_the_count_keeps_its_last_padding():
    scores = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 2.0, 1.0]]]).expand(2, 1, -1)
    valid = torch.tensor([[False] * 4 + [True] * 2, [True] * 6])
    assert reference.keep_best(scores, 4, valid).tolist() == [[[2, 3, 4, 5]], [[0, 1, 4, 5]]]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 30), padding=st.integers(0, 29), data=st.data())
def test_kept_tokens_are_the_best_ones_in_order(seed, tokens, padding, data):
    count = data.draw(st.integers(1, tokens))
    valid = torch.arange(tokens)[None] >= min(padding, tokens - 1)
    scores = torch.randint(0, 6, (1, 1, tokens), generator=torch.Generator().manual_seed(seed)).float()
    kept = reference.keep_best(scores, count, valid)[0, 0].tolist()
    assert kept == method.kept(scores[0, 0].numpy(), valid[0].numpy(), count)


def test_gather_takes_the_kept_rows_of_each_head_and_leaves_zeros_behind_them():
    keys, values = torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 6)
    indices = torch.tensor([[[0, 8], [3, 8]], [[1, 2], [7, 8]]])
    out = torch.full((2, 2, 5, 4), torch.nan), torch.full((2, 2, 5, 6), torch.inf)
    stored_keys, stored_values = reference.gather(keys, values, indices, out=out)
    assert stored_keys is out[0]
    assert stored_values is out[1]
    for row in range(2):
        for head in range(2):
            assert stored_keys[row, head, :2].equal(keys[row, head, indices[row, head]])
            assert stored_values[row, head, :2].equal(values[row, head, indices[row, head]])
    for stored in out:
        assert not stored[:, :, 2:].any()


def test_gather_without_storage_to_write_to_makes_some_of_the_right_size():
    keys, values = torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 6)
    indices = torch.tensor([[[0, 8], [3, 8]], [[1, 2], [7, 8]]])
    found = reference.gather(keys.transpose(2, 3).contiguous().transpose(2, 3), values, indices)
    out = torch.empty(2, 2, 2, 4), torch.empty(2, 2, 2, 6)
    for made, stored in zip(found, reference.gather(keys, values, indices, out=out), strict=True):
        assert made.equal(stored)
        assert made.untyped_storage().nbytes() == made.nbytes
