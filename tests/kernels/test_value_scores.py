import numpy as np
import pytest
import torch

import method
from problems import WITH_SINKS_OR_CAPPING, Problem, exact_attention, relative_error
from shiftkv_kernels import keep_best, reference, value_scores

# (heads, KV heads): MHA, Qwen2.5-VL's 7 to 1, MQA; head dims 40 (no power of 2) to 256; values with a dim of their own;
# as many proxies as fill a tile, fewer, and more that do not.
SMALL = [
    Problem(1, 4, 4, 32, 4, 16, 50),
    Problem(2, 7, 1, 32, 2, 40, 130, padding=70, value_dim=24),
    Problem(2, 4, 2, 80, 4, 80, 63),
    Problem(1, 2, 2, 10, 2, 64, 65, value_dim=128),
    Problem(1, 3, 1, 256, 32, 96, 64),
    Problem(2, 2, 1, 256, 1, 32, 129, padding=128),
    Problem(1, 20, 1, 8, 8, 16, 33),
    Problem(1, 1, 1, 4, 4, 16, 2),
    Problem(1, 1, 1, 42, 6, 24, 260),
]
LARGE = [
    Problem(1, 28, 4, 512, 32, 128, 8192),
    Problem(2, 28, 4, 512, 32, 128, 4099, padding=1500),
    Problem(1, 32, 32, 512, 16, 128, 2049),
    Problem(8, 28, 4, 512, 32, 128, 1023, padding=1000),
    Problem(1, 16, 16, 512, 32, 80, 3000),
    Problem(1, 12, 2, 512, 32, 64, 3000),
    Problem(1, 16, 2, 512, 32, 192, 3000, value_dim=128),
    Problem(1, 8, 4, 512, 32, 256, 2500),
    Problem(1, 71, 1, 512, 32, 64, 1500),
    Problem(2, 16, 16, 16, 1, 40, 2000),
    Problem(1, 14, 2, 360, 24, 128, 65),
]


def options(problem, device, **more):
    return {"scaling": problem.head_dim**-0.5, "valid": problem.valid(device), "last_weight": 2.0, **more}


def exact_scores(queries, last, keys, values, *, valid, last_weight, **keywords):
    """`value_scores` in float64, of what the inputs are in their own dtype."""
    given = values.double()

    def attention(rows):
        return exact_attention(rows, keys, valid=valid, **keywords).flatten(2, 3)

    def shares(mass):
        return mass.square().mean(2).sqrt() / (1 - mass.mean(2).clamp(max=0.999))

    by_proxies = attention(queries)
    output = by_proxies.mean(2, keepdim=True) @ given
    scores = (shares(by_proxies) + last_weight * shares(attention(last))) * (given - output).norm(dim=-1)
    scores = torch.where(by_proxies.mean(2) > 0.15, 1e30 * (1 + by_proxies.mean(2)), scores)
    return scores if valid is None else scores.masked_fill(~valid[:, None], 0)


def check(problem, device, dtype, kind=None):
    tensors, keywords = problem.tensors(device, dtype), options(problem, device)
    keywords |= problem.softmax_options(kind, device, dtype) if kind else {}
    tensors.append(problem.values(device, dtype))
    exact = exact_scores(*tensors, **keywords)
    found = value_scores(*tensors, **keywords, backend="triton")
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    sinks = exact >= 1e30
    assert (found >= 1e30).equal(sinks)
    torch.testing.assert_close(found[sinks], exact[sinks].float(), rtol=1e-5, atol=0)
    found, exact = found.masked_fill(sinks, 0), exact.masked_fill(sinks, 0)
    own = relative_error(reference.value_scores(*tensors, **keywords).masked_fill(sinks, 0), exact)
    # As for `group_mass`: both sides round float32 sums.  The square doubles what rounding does to a weight, and the
    # distance of values of length 1 from their mean adds its own.
    norms = tensors[0].float().norm(dim=-1).max() * tensors[2].float().norm(dim=-1).max()
    rounding = 4 * 2**-23 * max(norms.item() * keywords["scaling"], 1.0)
    assert relative_error(found, exact) <= 2 * own + 2 * rounding
    if problem.padding:
        assert found[-1, :, : problem.padding].eq(0).all()


# Triton's interpreter multiplies no bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.id)
def test_it_is_exact_to_float32_rounding(problem, dtype, device):
    check(problem, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", LARGE, ids=lambda problem: problem.id)
def test_large_inputs_are_exact_to_float32_rounding(problem, dtype):
    check(problem, torch.device("cuda"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("problem", "kind"), WITH_SINKS_OR_CAPPING, ids=lambda part: getattr(part, "id", part))
def test_learned_sinks_and_capped_logits(problem, kind, dtype, device):
    check(problem, device, dtype, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sinks", "softcap", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", LARGE[1:4] + LARGE[6:7], ids=lambda problem: problem.id)
def test_large_inputs_with_learned_sinks_and_capped_logits(problem, dtype, kind):
    check(problem, torch.device("cuda"), dtype, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [1.0, 4.0, 10.0])
def test_in_float32_the_kept_tokens_are_those_of_the_reference(spread):
    problem, device = Problem(2, 28, 4, 512, 32, 128, 4096, padding=1300), torch.device("cuda")
    tensors, keywords = problem.tensors(device, spread=spread), options(problem, device)
    tensors.append(problem.values(device))
    for budget in (64, 512):
        kept = [
            keep_best(value_scores(*tensors, **keywords, backend=backend), budget, keywords["valid"])
            for backend in ("triton", "torch")
        ]
        assert kept[0].equal(kept[1])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", [None, "both"])
def test_it_is_the_statement_in_float64(backend, kind, device):
    problem = Problem(2, 6, 2, 12, 3, 16, 23, padding=5, value_dim=8)
    tensors = [*problem.tensors(device), problem.values(device)]
    more = problem.softmax_options(kind, device) if kind else {}
    found = value_scores(*tensors, **options(problem, device, **more), backend=backend).cpu().numpy()
    proxies, last, keys, values = (part.cpu().numpy().astype(np.float64) for part in tensors)
    valid = problem.valid("cpu").numpy()
    for row, head in np.ndindex(2, 2):
        heads = slice(3 * head, 3 * head + 3)
        sinks = more["sinks"][heads].cpu().double().numpy() if kind else None
        logits = method.Logits(0.25, more.get("softcap"), sinks)
        expected = method.value_scores(
            proxies[row, heads], last[row, heads], keys[row, head], values[row, head], valid[row], logits, 2.0
        )
        np.testing.assert_allclose(found[row, head], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_tokens_with_much_of_the_mass_come_first_however_short_their_values(backend, device):
    problem = Problem(1, 4, 2, 32, 4, 16, 60)
    queries, last, keys = problem.tensors(device, spread=0.1)
    values, keywords = problem.values(device), options(problem, device)
    queries[..., 0] = 9.0
    keys[..., 0] = 0
    keys[:, :, [3, 40], 0] = torch.tensor([2.0, 2.5], device=device)  # most of the mass, and more for the second
    values[:, :, [3, 40]] = 0
    scores = value_scores(queries, last, keys, values, **keywords, backend=backend)
    assert (scores >= reference.values.SINK_SCORE).nonzero()[:, 2].tolist() == [3, 40, 3, 40]
    assert scores.isfinite().all()
    assert keep_best(scores, 2, backend=backend).tolist() == [[[40, 59]] * 2]
    alone = [part[:, :, 3:4] for part in (keys, values)]
    one = value_scores(queries, last, *alone, scaling=0.25, backend=backend)
    torch.testing.assert_close(one, torch.full_like(one, 2 * reference.values.SINK_SCORE))


def test_any_strides(device):
    problem = Problem(2, 4, 2, 16, 2, 32, 70)
    tensors, keywords = [*problem.tensors(device), problem.values(device)], options(problem, device)
    expected = value_scores(*tensors, **keywords, backend="triton")
    layouts = [
        [part.transpose(1, 2).contiguous().transpose(1, 2) for part in tensors],
        [part.transpose(2, 3).contiguous().transpose(2, 3) for part in tensors],
        [part.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for part in tensors],
        [torch.stack([part, part + 9], dim=3).flatten(2, 3)[:, :, ::2] for part in tensors],
    ]
    for layout in layouts:
        found = value_scores(*layout, **keywords, backend="triton")
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", [None, "both"])
def test_tokens_that_are_not_finite_have_no_score_and_change_no_other(number, backend, kind, device):
    problem = Problem(2, 4, 2, 16, 2, 32, 70)
    queries, last, keys = problem.tensors(device)
    values, keywords = problem.values(device), options(problem, device)
    keywords |= problem.softmax_options(kind, device) if kind else {}
    keys[0, 0, 31, 3] = values[1, 1, 7, 9] = values[1, 1, 69, 0] = number
    scores = value_scores(queries, last, keys, values, **keywords, backend=backend)
    assert scores.isnan().nonzero().tolist() == [[0, 0, 31], [1, 1, 7], [1, 1, 69]]
    kept = keep_best(scores, 68, backend=backend)
    assert 31 not in kept[0, 0]
    assert 7 not in kept[1, 1]
    assert 69 in kept[1, 1]  # the last token is always kept
    # A key that is not finite is as good as padding.
    without = torch.arange(70, device=device) != 31
    fewer = [part[:1, :, without] for part in (keys, values)]
    expected = value_scores(queries[:1], last[:1], *fewer, **keywords, backend=backend)
    torch.testing.assert_close(scores[0, 0, without], expected[0, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", [None, "both"])
def test_a_last_query_that_is_not_finite_counts_for_nothing(backend, kind, device):
    problem = Problem(1, 4, 2, 16, 2, 32, 40)
    queries, last, keys = problem.tensors(device)
    values, keywords = problem.values(device), options(problem, device)
    keywords |= problem.softmax_options(kind, device) if kind else {}
    found = value_scores(queries, last * torch.nan, keys, values, **keywords, backend=backend)
    expected = value_scores(queries, last, keys, values, **{**keywords, "last_weight": 0.0}, backend=backend)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_row_does_not_depend_on_its_neighbours(backend, device):
    problem = Problem(3, 4, 2, 16, 2, 32, 90, padding=40)
    tensors, keywords = [*problem.tensors(device), problem.values(device)], options(problem, device)
    together = value_scores(*tensors, **keywords, backend=backend)
    for row in range(3):
        padding = 40 if row == 2 else 0
        own = [
            *(part[row : row + 1] for part in tensors[:2]),
            *(part[row : row + 1, :, padding:] for part in tensors[2:]),
        ]
        alone = value_scores(*own, scaling=keywords["scaling"], last_weight=2.0, backend=backend)
        torch.testing.assert_close(together[row : row + 1, :, padding:], alone, atol=1e-6, rtol=1e-5)
