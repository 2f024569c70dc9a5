import pytest
import torch

from shiftkv_kernels import keep_best, reference
from shiftkv_kernels.fused import search


@pytest.fixture(params=["resident", "streamed"])
def short_rows(request, monkeypatch):
    """Rows of more than 256 tokens are taken to be too long for registers, or not."""
    if request.param == "streamed":
        resident, streamed = {"BLOCK": 256, "RESIDENT": True}, {"BLOCK": 64, "RESIDENT": False}
        options = tuple({**each, "num_warps": 4} for each in (resident, streamed))
        monkeypatch.setattr(search, "ROW_OPTIONS", options)


def random_scores(batch, kv_heads, tokens, kind):
    scores = torch.rand(batch, kv_heads, tokens, generator=torch.Generator().manual_seed(tokens)) * 4
    return {"distinct": scores, "tied": scores.round(), "zero": scores * 0}[kind]


def padded(batch, tokens, padding):
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[-1, :padding] = False
    return valid


@pytest.mark.parametrize("kind", ["distinct", "tied", "zero"])
@pytest.mark.parametrize("shape", [(2, 1, 129), (1, 1, 1), (2, 1, 2), (1, 1, 601)])
def test_the_kept_are_those_of_the_reference(shape, kind, device, short_rows):
    batch, _, tokens = shape
    scores = random_scores(*shape, kind).to(device)
    for count in sorted({1, 2, tokens // 3, tokens} & set(range(1, tokens + 1))):
        for padding in (0, tokens // 2):
            valid = padded(batch, tokens, padding).to(device) if padding else None
            found = keep_best(scores, count, valid, backend="triton")
            assert torch.equal(found, reference.keep_best(scores, count, valid)), (count, padding)


def test_negative_zero_ties_with_zero(device):
    scores = torch.tensor([[[0.0, -0.0, 0.0, 1.0, 0.0]]], device=device)
    assert keep_best(scores, 4, backend="triton").tolist() == [[[0, 1, 3, 4]]]


def test_rows_that_are_not_contiguous(device):
    scores = random_scores(2, 100, 3, "distinct").transpose(1, 2).to(device)
    assert torch.equal(keep_best(scores, 9, backend="triton"), reference.keep_best(scores, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["distinct", "tied", "zero"])
@pytest.mark.parametrize("tokens", [2048, 8191, 32768, 32769, 131072])
def test_long_rows(tokens, kind):
    scores = random_scores(2, 4, tokens, kind).cuda()
    for count in (2, 64, 513, tokens // 2):
        for padding in (0, tokens // 3, tokens - 10):
            valid = padded(2, tokens, padding).cuda() if padding else None
            found = keep_best(scores, count, valid, backend="triton")
            assert torch.equal(found, reference.keep_best(scores, count, valid)), (count, padding)
