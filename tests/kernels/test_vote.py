import pytest
import torch

from shiftkv_kernels import reference, vote
from shiftkv_kernels.fused import search

THRESHOLDS = [0.95, 0.3, 1e-6]


def random_mass(batch, kv_heads, groups, tokens):
    """Few tokens with most of the mass, as in attention."""
    generator = torch.Generator().manual_seed(tokens)
    mass = torch.rand(batch, kv_heads, groups, tokens, generator=generator) ** 8 / tokens
    mass[..., -1] = 0
    return mass


@pytest.fixture(params=["resident", "streamed"])
def short_rows(request, monkeypatch):
    """Rows of more than 256 tokens are taken to be too long for registers, or not."""
    if request.param == "streamed":
        resident, streamed = {"BLOCK": 256, "RESIDENT": True}, {"BLOCK": 64, "RESIDENT": False}
        options = tuple({**each, "num_warps": 4} for each in (resident, streamed))
        monkeypatch.setattr(search, "ROW_OPTIONS", options)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("shape", [(1, 2, 2, 300), (1, 1, 33, 5), (1, 1, 1, 1), (2, 3, 2, 2), (1, 1, 2, 601)])
def test_votes_are_those_of_the_reference(shape, threshold, device, short_rows):
    mass = random_mass(*shape).to(device)
    assert torch.equal(vote(mass, threshold, backend="triton"), reference.vote(mass, threshold))


# Sums of so few eighths are exact, so that nothing is left to rounding.
@pytest.mark.parametrize("threshold", [1 / 16, 0.5, 15 / 16, 1.0])
@pytest.mark.parametrize("highest", [1, 2, 9])
def test_of_equal_masses_the_earlier_ones_get_the_votes(highest, threshold, device, short_rows):
    counts = torch.randint(0, highest, (1, 1, 4, 300), generator=torch.Generator().manual_seed(highest))
    mass = counts.to(device, torch.float32) / 8
    mass[0, 0, 0] = 0
    mass[0, 0, 1] = 0.25
    assert torch.equal(vote(mass, threshold, backend="triton"), reference.vote(mass, threshold))


def test_masses_of_any_size(device, short_rows):
    exponents = torch.arange(-140, 100, dtype=torch.float64)
    mass = (2.0**exponents).float().flip(0).to(device).reshape(1, 1, 1, -1)
    for scale in (1.0, 1e-30):
        scaled = mass * scale
        for threshold in THRESHOLDS:
            assert torch.equal(vote(scaled, threshold, backend="triton"), reference.vote(scaled, threshold))


def assert_is_smallest_set(mass, votes, threshold):
    """`votes` of single groups: they reach the share, and would not without the least of them, but for rounding."""
    chosen = torch.where(votes > 0, mass[..., 0, :].double(), 0)
    share = threshold * mass[..., 0, :].double().sum(-1)
    least = torch.where(votes > 0, mass[..., 0, :].double(), torch.inf).amin(-1)
    slack = 1e-5 * share
    assert (chosen.sum(-1) >= share - slack).all()
    assert (chosen.sum(-1) - least < share + slack).all()
    left_out = torch.where(votes > 0, -1, mass[..., 0, :].double()).amax(-1)
    assert (left_out <= least).all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2048, 8191, 32768, 32769, 131072])
def test_long_rows(tokens):
    mass = random_mass(1, 40, 1, tokens).cuda()
    for threshold in THRESHOLDS:
        assert_is_smallest_set(mass, vote(mass, threshold, backend="triton"), threshold)
    grouped = random_mass(1, 4, 32, tokens).cuda()
    found = vote(grouped, 0.95, backend="triton")
    # a vote more or less where rounding decides
    assert (found - reference.vote(grouped, 0.95)).abs().sum() <= 1e-4 * found.sum()
    assert torch.equal(found, vote(grouped, 0.95, backend="triton"))
