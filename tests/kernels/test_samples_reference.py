import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import method
from shiftkv_kernels.reference import draw_samples, gaussian_noise, prompt_statistics, token_statistics


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 50),
    padding=st.integers(0, 49),
    window=st.none() | st.integers(1, 60),
    offset=st.sampled_from([0.0, 3.0, -500.0]),
    pieces=st.integers(1, 4),
)
def test_statistics_of_a_prompt_in_pieces_are_those_of_the_whole(seed, tokens, padding, window, offset, pieces):
    hidden = torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(seed)) + offset
    valid = torch.arange(tokens)[None] >= min(padding, tokens - 1)
    parts = [token_statistics(part) for part in hidden.split(-(-tokens // pieces), dim=1)]
    means, squares = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    mean, deviation = prompt_statistics(means, squares, 24, valid=valid, window=window)
    expected = method.statistics(hidden[0].numpy(), valid[0].numpy(), window)
    np.testing.assert_allclose([mean.item(), deviation.item()], expected, rtol=2e-5, atol=1e-5)


def test_statistics_of_more_tokens_than_are_converted_at_once():
    hidden = torch.randn(2, 5000, 8).bfloat16()
    mean, deviation = prompt_statistics(*token_statistics(hidden), 8)
    assert mean.dtype == deviation.dtype == torch.float32
    torch.testing.assert_close(mean, hidden.float().mean(dim=(1, 2)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(deviation, hidden.float().flatten(1).std(dim=1), rtol=1e-5, atol=0)


CPU = torch.device("cpu")


def test_noise_is_seeded_by_seed_and_stream_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    noise = gaussian_noise(64, 300, seed=1, stream=2, device=CPU)
    assert torch.get_rng_state().equal(before)
    assert noise.equal(gaussian_noise(64, 300, seed=1, stream=2, device=CPU))
    for seed, stream in ((1, 3), (2, 2), (0, 2), (2, 1)):
        assert not noise.equal(gaussian_noise(64, 300, seed=seed, stream=stream, device=CPU))


def test_noise_is_standard_normal_and_without_correlation():
    noise = gaussian_noise(512, 512, seed=3, stream=7, device=CPU).double()
    # Of 2**18 values: five standard errors.
    assert noise.mean().abs() < 5 / 2**9
    assert abs(noise.var() - 1) < 5 * 2**0.5 / 2**9
    assert abs((noise**4).mean() - 3) < 5 * 96**0.5 / 2**9
    assert noise.abs().max() < 6
    for pair in (noise[1:] * noise[:-1], noise[:, 1:] * noise[:, :-1], noise[256:] * noise[:256]):
        assert pair.mean().abs() < 5 / pair.numel() ** 0.5


def samples(hidden, gamma, dtype=torch.float32, **settings):
    return draw_samples(
        *token_statistics(hidden),
        count=256,
        features=hidden.shape[2],
        gamma=gamma,
        seed=0,
        stream=0,
        dtype=dtype,
        **settings,
    )


def test_samples_have_the_expanded_deviation_of_their_row():
    hidden = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    hidden[1] = hidden[1] * 3 - 1
    noise = gaussian_noise(256, 64, seed=0, stream=0, device=CPU)
    for row, drawn in enumerate(samples(hidden, 10.0)):
        expected = hidden[row].mean() + 10 * hidden[row].std() * noise
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-3)


def test_padding_and_what_is_before_the_window_do_not_count():
    hidden = torch.randn(1, 50, 64)
    padded = torch.cat([torch.full((1, 9, 64), 1e3), hidden], dim=1)
    valid = torch.arange(59)[None] >= 9
    torch.testing.assert_close(samples(padded, 2.0, valid=valid), samples(hidden, 2.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(samples(padded, 2.0, window=50), samples(hidden, 2.0), rtol=1e-4, atol=1e-4)


def test_gamma_zero_makes_every_proxy_the_mean():
    hidden = torch.randn(1, 50, 64)
    drawn = samples(hidden, 0.0, dtype=torch.bfloat16)
    assert drawn.dtype == torch.bfloat16
    assert drawn.eq(hidden.mean().bfloat16()).all()
