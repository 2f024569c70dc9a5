import math

import pytest
import torch

from shiftkv_kernels import draw_samples, reference, rotate_queries, token_statistics
from shiftkv_kernels.reference.proxies import _philox


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 100), (1, 1, 1), (1, 3, 1025)])
def test_token_statistics(shape, dtype, device):
    # A mean far from 0 would show a variance made of the mean of squares.
    states = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 30).to(device, dtype)
    means, squares = token_statistics(states, backend="triton")
    wide = states.double()
    torch.testing.assert_close(means.double(), wide.mean(-1), atol=1e-5, rtol=1e-6)
    expected = wide.var(-1, correction=0) * shape[-1]
    torch.testing.assert_close(squares.double(), expected, atol=1e-5 * shape[-1], rtol=1e-5)


def test_token_statistics_of_a_part_of_a_tensor(device):
    states = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0)).to(device)
    for part in (states[:, 2:7], states[..., ::2], states.transpose(0, 1)):
        for found, wanted in zip(
            token_statistics(part, backend="triton"), reference.token_statistics(part), strict=True
        ):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_last_tokens_states_are_copied_beside_the_statistics(backend, dtype, device):
    states = torch.randn(2, 9, 1030, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for part in (states, states[:, 2:7], states[:, :1], states[..., ::2]):
        last = torch.full((2, 1, part.shape[2]), float("nan"), device=device, dtype=dtype)
        found = token_statistics(part, last=last, backend=backend)
        assert last.equal(part[:, -1:])
        torch.testing.assert_close(found, reference.token_statistics(part))


@pytest.mark.parametrize("size", [(32, 100), (3, 7), (512, 24)])
@pytest.mark.parametrize("window", [None, 10, 40, 1000])
@pytest.mark.parametrize("padding", [0, 35])
def test_samples_are_those_of_the_reference(size, window, padding, device):
    generator = torch.Generator().manual_seed(0)
    means = (torch.randn(2, 47, generator=generator) + 5).to(device)
    squares = (torch.rand(2, 47, generator=generator) * size[1]).to(device)
    valid = None
    if padding:
        valid = torch.arange(47, device=device) >= torch.tensor([[padding], [0]], device=device)
    arguments = {
        "count": size[0],
        "features": size[1],
        "gamma": 10.0,
        "seed": 2**32 - 3,
        "stream": 5,
        "dtype": torch.float32,
        "valid": valid,
        "window": window,
    }
    found = draw_samples(means, squares, **arguments, backend="triton")
    expected = reference.draw_samples(means, squares, **arguments)
    # GPUs approximate logarithms: for a radius next to 0, to within 1e-3 of a deviation.
    scale = expected.std().item()
    torch.testing.assert_close(found, expected, atol=1e-3 * scale, rtol=0)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    half = draw_samples(means, squares, **{**arguments, "dtype": torch.bfloat16}, backend="triton")
    torch.testing.assert_close(half, found.bfloat16(), atol=1e-2 * scale, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(32, 100), (3, 7), (5, 600), (1, 1)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_last_state_follows_the_samples_of_its_row(size, backend, dtype, device):
    generator = torch.Generator().manual_seed(0)
    means, squares = torch.randn(3, 20, generator=generator).to(device), torch.ones(3, 20, device=device)
    valid = torch.arange(20, device=device) >= torch.tensor([[0], [7], [19]], device=device)
    arguments = {"count": size[0], "features": size[1], "gamma": 2.0, "seed": 1, "stream": 3, "dtype": dtype}
    arguments |= {"valid": valid, "backend": backend}
    # As it comes: the last token of hidden states, a copy of it, and one whose features are no neighbours.
    hidden = torch.randn(3, 4, size[1], generator=generator).to(device, dtype)
    turned = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    expected = draw_samples(means, squares, **arguments)
    for states in (hidden, turned):
        for last in (states[:, 3:], states[:, 3:].clone()):
            found = draw_samples(means, squares, **arguments, last=last)
            assert found.shape == (3, size[0] + 1, size[1])
            assert found.dtype == dtype
            assert found.is_contiguous()
            assert found[:, :-1].equal(expected)
            assert found[:, -1:].equal(last)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"last": torch.zeros(2, 2, 8)}, ValueError, r"last has shape \(2, 2, 8\)"),
        ({"last": torch.zeros(2, 1, 7)}, ValueError, r"last has shape \(2, 1, 7\)"),
        ({"last": torch.zeros(3, 1, 8)}, ValueError, r"last has shape \(3, 1, 8\)"),
        (
            {"last": torch.zeros(2, 1, 8).half()},
            (TypeError, ValueError),
            "last is torch.float16, must be torch.float32",
        ),
    ],
)
def test_a_last_state_that_does_not_fit_is_named(changes, error, words):
    arguments = {"count": 4, "features": 8, "gamma": 1.0, "seed": 0, "stream": 0, "dtype": torch.float32, **changes}
    with pytest.raises(error, match=words):
        draw_samples(torch.zeros(2, 5), torch.ones(2, 5), **arguments)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_tokens_that_are_not_finite_are_no_part_of_the_statistics(backend, number, device):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(2, 14, 24, generator=generator) + 5).to(device)
    valid = torch.arange(14, device=device) >= torch.tensor([[0], [4]], device=device)
    arguments = {"count": 8, "features": 24, "gamma": 3.0, "seed": 1, "stream": 2, "dtype": torch.float32}
    arguments |= {"backend": backend}
    for broken in ([3], [13], [0, 5, 13], list(range(6, 14))):
        spoilt = hidden.clone()
        spoilt[0, broken, 7] = number
        without = valid.clone()
        without[0, broken] = False
        for window in (None, 9):
            found = draw_samples(*token_statistics(spoilt, backend=backend), **arguments, valid=valid, window=window)
            whole = draw_samples(*token_statistics(hidden, backend=backend), **arguments, valid=without, window=window)
            torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
            assert found.isfinite().all()


def test_noise_is_normal_and_its_streams_are_unrelated():
    noises = [
        reference.gaussian_noise(512, 500, seed=seed, stream=stream, device=torch.device("cpu"))
        for seed, stream in ((0, 0), (0, 1), (1, 0))
    ]
    for noise in noises:
        # standard errors of 256,000 values: 0.002 of the mean, 0.0014 of the deviation, 0.02 of the kurtosis
        assert abs(noise.mean()) < 0.008
        assert abs(noise.std() - 1) < 0.006
        assert abs((noise**4).mean() - 3) < 0.08
        assert 4 < noise.abs().max() < 6
        assert abs(torch.corrcoef(noise.flatten(1)[::64]).fill_diagonal_(0)).max() < 0.2
    assert abs(torch.corrcoef(torch.stack([noise.flatten() for noise in noises])).fill_diagonal_(0)).max() < 0.01


def test_the_generator_is_philox():
    # Known answers of Random123: counter and key all zeros, and all ones.
    words = _philox(torch.tensor([0]), 0, 0)
    assert [word.item() for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def angles(positions, rotated):
    frequencies = 10000 ** (-torch.arange(0, rotated, 2) / rotated)
    return positions[:, None] * torch.cat([frequencies, frequencies])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "rotated"), [(16, 16), (20, 12), (40, 40), (80, 20)])
@pytest.mark.parametrize("rows_of_factors", [1, 2])
def test_rotation(head_dim, rotated, rows_of_factors, dtype, device):
    batch, heads, count, group_size, stride = 2, 3, 40, 8, 5
    generator = torch.Generator().manual_seed(head_dim)
    # as a projection leaves them: (B, N, H, D)
    queries = torch.randn(batch, count, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
    last = torch.randn(batch, 1, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
    positions = torch.tensor([11.0, 3.0])[:rows_of_factors]
    here = angles(positions, rotated)[:, None].to(device)
    steps = angles(torch.arange(1, group_size + 1) * float(stride), rotated).to(device)
    arguments = queries, last, here.cos().to(dtype), here.sin().to(dtype), steps.cos(), steps.sin()
    found = rotate_queries(*arguments, backend="triton")
    for part, wanted in zip(found, reference.rotate_queries(*arguments), strict=True):
        assert part.is_contiguous()
        assert part.dtype == dtype
        torch.testing.assert_close(part, wanted)
    if dtype == torch.float32:
        # A rotation by the sum of two angles: the complex product.
        members = torch.arange(count) % group_size
        where = positions[:, None] + (members + 1) * stride
        turns = torch.polar(torch.ones(1), angles(where.flatten(), rotated)[:, : rotated // 2]).to(device)
        turns = turns.view(rows_of_factors, 1, count, -1)
        pairs = torch.complex(queries[..., : rotated // 2], queries[..., rotated // 2 : rotated]) * turns
        expected = torch.cat([pairs.real, pairs.imag, queries[..., rotated:]], dim=-1)
        torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


def test_a_whole_turn_changes_nothing(device):
    queries = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).to(device)
    full_turn = torch.full((1, 1, 8), 2 * math.pi, device=device)
    steps = torch.zeros(2, 8, device=device)
    turned, last = rotate_queries(
        queries, queries[:, :, :1], full_turn.cos(), full_turn.sin(), steps.cos(), steps.sin(), backend="triton"
    )
    torch.testing.assert_close(turned, queries, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, queries[:, :, :1], atol=1e-5, rtol=1e-5)
