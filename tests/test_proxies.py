import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import method
from mmshiftkv.proxies import expanded_samples, gaussian_noise, prompt_statistics, token_statistics


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


def test_noise_is_seeded_by_layer_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    noise = gaussian_noise(64, 300, seed=1, layer=2, device=torch.device("cpu"))
    assert torch.get_rng_state().equal(before)
    assert noise.equal(gaussian_noise(64, 300, seed=1, layer=2, device=torch.device("cpu")))
    for seed, layer in ((1, 3), (2, 2), (0, 2)):
        assert not noise.equal(gaussian_noise(64, 300, seed=seed, layer=layer, device=torch.device("cpu")))
    assert abs(noise.mean().item()) < 0.03
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_samples_have_the_expanded_deviation_of_their_row():
    noise = gaussian_noise(512, 256, seed=0, layer=0, device=torch.device("cpu"))
    samples = expanded_samples(
        torch.tensor([0.5, -1.0]), torch.tensor([0.1, 2.0]), noise, gamma=10.0, dtype=torch.float32
    )
    torch.testing.assert_close(samples[0], 0.5 + noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(samples[1], -1.0 + 20 * noise, rtol=1e-5, atol=1e-4)


def test_gamma_zero_makes_every_proxy_the_mean():
    noise = gaussian_noise(4, 6, seed=0, layer=0, device=torch.device("cpu"))
    samples = expanded_samples(torch.tensor([0.25]), torch.tensor([3.0]), noise, gamma=0.0, dtype=torch.bfloat16)
    assert samples.eq(0.25).all()
    assert samples.dtype == torch.bfloat16
