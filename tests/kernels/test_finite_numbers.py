"""What the kernels and their references do with numbers that are not finite."""

import pytest
import torch

from shiftkv_kernels import gather, keep_best


@pytest.mark.parametrize(("padding", "number"), [(0, torch.nan), (12, torch.inf)])
def test_the_flag_says_whether_a_score_of_a_token_was_not_finite(padding, number, device):
    scores = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(device)
    valid = (torch.arange(50) >= torch.tensor([[0], [padding]])).to(device) if padding else None
    for backend in ("torch", "triton"):
        flag = torch.zeros(1, dtype=torch.bool, device=device)
        expected = keep_best(scores, 20, valid, not_finite=flag, backend=backend)
        assert not flag
        if padding:
            spoilt = scores.clone()
            spoilt[1, :, :padding] = number  # padding says nothing
            assert keep_best(spoilt, 20, valid, not_finite=flag, backend=backend).equal(expected)
            assert not flag
        for column in (20, 49):
            spoilt = scores.clone()
            spoilt[1, 2, column] = number
            kept = keep_best(spoilt, 20, valid, not_finite=flag, backend=backend)
            assert flag
            assert kept[:, :2].equal(expected[:, :2])
            assert (column in kept[1, 2]) == (column == 49)
            # It stays set, as of a layer before.
            keep_best(scores, 20, valid, not_finite=flag, backend=backend)
            assert flag
            flag.zero_()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_that_are_not_finite_come_last_but_before_padding(backend, device):
    scores = torch.full((1, 1, 12), torch.nan, device=device)
    scores[..., 5], scores[..., 8] = 0.0, 2.0
    valid = torch.arange(12, device=device)[None] >= 4
    for count, expected in [(2, [8, 11]), (3, [5, 8, 11]), (4, [4, 5, 8, 11]), (9, [3, *range(4, 12)])]:
        assert keep_best(scores, count, valid, backend=backend).tolist() == [[expected]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_gathered_is_zero_where_it_was_not_finite(dtype, backend, device):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 30, dim, generator=generator).to(device, dtype) for dim in (24, 40))
    indices = torch.arange(3, 30, 2, device=device).expand(1, 2, -1).contiguous()
    spoilt = [part.clone() for part in (keys, values)]
    spoilt[0][0, 1, 5, 3] = torch.nan
    spoilt[0][0, 0, 7] = torch.inf
    spoilt[1][0, 0, 29, -1] = -torch.inf
    for slots in (None, 20):
        out = None if slots is None else tuple(part.new_full((1, 2, 20, part.shape[3]), torch.nan) for part in spoilt)
        found = gather(*spoilt, indices, out=out, backend=backend)
        for mine, part, whole in zip(found, spoilt, (keys, values), strict=True):
            expected = whole.where(part.isfinite(), 0)[:, :, 3:30:2]
            assert mine[:, :, : indices.shape[2]].equal(expected)
            assert not mine[:, :, indices.shape[2] :].any()
