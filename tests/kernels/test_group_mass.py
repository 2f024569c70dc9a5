import math

import pytest
import torch

from problems import WITH_SINKS_OR_CAPPING, Problem, allowed_errors, exact_group_mass, relative_error
from shiftkv_kernels import group_mass, reference
from shiftkv_kernels.fused import tiles

# (heads, KV heads): MHA, Qwen2.5-VL's 7 to 1, MQA; head dims 40 (no power of 2) to 256; groups that fill a tile, that
# are a part of one, that are larger than one, and whose size is no power of 2.
SMALL = [
    Problem(1, 4, 4, 32, 4, 16, 50),
    Problem(2, 7, 1, 32, 2, 40, 130, padding=70),
    Problem(2, 4, 2, 48, 3, 80, 63),
    Problem(1, 2, 2, 10, 2, 64, 65),
    Problem(1, 3, 1, 256, 32, 96, 64),
    Problem(2, 2, 1, 256, 1, 32, 129, padding=128),
    Problem(1, 1, 1, 16, 1, 256, 40),
    Problem(1, 20, 1, 8, 8, 16, 33),
    Problem(1, 1, 1, 4, 4, 16, 1),
    Problem(2, 2, 1, 8, 2, 16, 2, padding=1),
    Problem(1, 1, 1, 42, 6, 24, 260),
]
LARGE = [
    Problem(1, 28, 4, 512, 32, 128, 8192),
    Problem(2, 28, 4, 512, 32, 128, 4099, padding=1500),
    Problem(1, 32, 32, 512, 16, 128, 2049),
    Problem(8, 28, 4, 512, 32, 128, 1023, padding=1000),
    Problem(1, 16, 16, 512, 32, 80, 3000),
    Problem(1, 32, 8, 512, 32, 96, 3000),
    Problem(1, 12, 2, 512, 32, 64, 3000),
    Problem(1, 8, 4, 512, 32, 256, 2500),
    Problem(1, 71, 1, 512, 32, 64, 1500),
    Problem(2, 16, 16, 16, 1, 40, 2000),
    Problem(1, 14, 2, 360, 24, 128, 65),
    Problem(1, 28, 4, 512, 32, 128, 64),
    Problem(1, 28, 4, 512, 1, 128, 1),
]
ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(problem: Problem, device, dtype, kind=None, **options):
    tensors, keywords = problem.tensors(device, dtype, **options), problem.keywords(device)
    keywords |= problem.softmax_options(kind, device, dtype) if kind else {}
    found = group_mass(*tensors, **keywords, backend="triton")
    exact = exact_group_mass(*tensors, **keywords)
    assert [part.shape for part in found] == [part.shape for part in exact]
    for part, wanted, allowed in zip(found, exact, allowed_errors(*tensors, **keywords), strict=True):
        assert part.dtype == torch.float32
        assert part.is_contiguous()
        assert part[..., -1].eq(0).all()
        assert relative_error(part, wanted) <= allowed
    if problem.padding:
        assert all(part[-1, ..., : problem.padding].eq(0).all() for part in found)


# Triton's interpreter multiplies no bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.id)
def test_it_is_exact_to_float32_rounding(problem, dtype, device):
    check(problem, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("problem", LARGE, ids=lambda problem: problem.id)
def test_large_inputs_are_exact_to_float32_rounding(problem, dtype):
    check(problem, torch.device("cuda"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("problem", "kind"), WITH_SINKS_OR_CAPPING, ids=lambda part: getattr(part, "id", part))
def test_learned_sinks_and_capped_logits(problem, kind, dtype, device):
    check(problem, device, dtype, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sinks", "softcap", "both"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("problem", LARGE[1:4], ids=lambda problem: problem.id)
def test_large_inputs_with_learned_sinks_and_capped_logits(problem, dtype, kind):
    check(problem, torch.device("cuda"), dtype, kind)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_with_them_too_what_is_not_finite_counts_for_nothing(number, device):
    problem = Problem(2, 4, 2, 8, 2, 16, 40)
    queries, last, keys = problem.tensors(device)
    keywords = problem.keywords(device) | problem.softmax_options("both", device)
    keys[0, 0, 31, 3] = last[1, 3, 0, 5] = number
    found, expected = (group_mass(queries, last, keys, **keywords, backend=name) for name in ("triton", "torch"))
    is_key = torch.zeros(2, 2, 40, dtype=torch.bool, device=device)
    is_key[0, 0, 31] = True
    torch.testing.assert_close(found[1][~is_key], expected[1][~is_key], atol=1e-6, rtol=1e-5)
    others = ~is_key[:, :, None].expand_as(found[0])
    torch.testing.assert_close(found[0][others], expected[0][others], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("spread", [0.0, 100.0])
def test_even_and_one_sided_attention(spread, device):
    check(Problem(1, 4, 2, 32, 4, 32, 100), device, torch.float32, spread=spread)


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [64, 128])
@pytest.mark.parametrize("streamed", [32, 64, 128])
def test_other_tiles_give_the_same(kept, streamed):
    from shiftkv_kernels.fused.group_mass import group_mass as fused

    problem, device = Problem(1, 14, 2, 512, 32, 128, 777, padding=100), torch.device("cuda")
    tensors, keywords = problem.tensors(device, torch.bfloat16), problem.keywords(device)
    expected = reference.group_mass(*tensors, **keywords)
    for warps in (4, 8):
        choice = tiles.Tiles(kept, streamed, warps, 2)
        for found, wanted in zip(fused(*tensors, **keywords, tiles=(choice, choice)), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_any_strides(device):
    problem = Problem(2, 4, 2, 16, 2, 32, 70)
    tensors, keywords = problem.tensors(device), problem.keywords(device)
    expected = group_mass(*tensors, **keywords, backend="triton")
    layouts = [
        # as a projection leaves them: (B, T, H, D)
        [part.transpose(1, 2).contiguous().transpose(1, 2) for part in tensors],
        # features outermost, batch innermost, every other row of a larger tensor, one row for all of a batch
        [part.transpose(2, 3).contiguous().transpose(2, 3) for part in tensors],
        [part.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for part in tensors],
        [torch.stack([part, part + 9], dim=3).flatten(2, 3)[:, :, ::2] for part in tensors],
    ]
    for layout in layouts:
        for found, wanted in zip(group_mass(*layout, **keywords, backend="triton"), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-5)
    alike = [part[:1].expand(2, -1, -1, -1) for part in tensors]
    mass, last_mass = group_mass(*alike, **keywords, backend="triton")
    assert torch.equal(mass[0], mass[1])
    assert torch.equal(last_mass[0], last_mass[1])


def test_offsets_beyond_32_bits(device):
    # Memory that is never touched costs nothing: three keys of a row are 2 ** 30 elements apart, two rows 2 ** 29.
    stride = 2**30
    storage = torch.empty(2 * stride + stride // 2 + 64, dtype=torch.float16, device=device)
    keys = storage.as_strided((2, 1, 3, 16), (stride // 2, 0, stride, 1))
    keys.copy_(torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(0)))
    queries = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    keywords = {"num_groups": 2, "scaling": 0.25}
    found = group_mass(queries, queries[:, :, :1], keys, **keywords, backend="triton")
    expected = reference.group_mass(queries, queries[:, :, :1], keys.contiguous(), **keywords)
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-6, rtol=1e-4)


def test_padding_may_be_anywhere(device):
    problem = Problem(2, 2, 1, 16, 2, 32, 150)
    tensors, keywords = problem.tensors(device), problem.keywords(device)
    keywords["valid"] = (torch.rand(2, 150, generator=torch.Generator().manual_seed(0)) < 0.3).to(device)
    keywords["valid"][:, -1] = True
    found = group_mass(*tensors, **keywords, backend="triton")
    for part, wanted in zip(found, reference.group_mass(*tensors, **keywords), strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("programs", [1, 7, 29, 116, 500])
@pytest.mark.parametrize("steps", [1, 2, 5, 16, 64, 1024])
def test_a_split_covers_all_steps_and_takes_no_longer(programs, steps):
    parts, per_part = tiles.split(programs, steps, 132)
    assert (parts - 1) * per_part < steps <= parts * per_part
    rounds = math.ceil(programs * parts / 264)
    assert rounds * per_part <= math.ceil(programs / 264) * steps
