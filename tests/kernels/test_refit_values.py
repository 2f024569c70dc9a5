import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import method
from problems import WITH_SINKS_OR_CAPPING, Problem, exact_attention, relative_error
from shiftkv_kernels import attend, reference, refit_values

# As in test_value_scores.py, and the tokens that are kept: 1, one less than all, some, more than a row has.
SMALL = [
    (Problem(1, 4, 4, 32, 4, 16, 50), 10),
    (Problem(2, 7, 1, 32, 2, 40, 130, padding=70, value_dim=24), 65),
    (Problem(2, 4, 2, 48, 4, 80, 63), 1),
    (Problem(1, 2, 2, 10, 2, 64, 165, value_dim=128), 164),
    (Problem(2, 20, 1, 8, 8, 16, 200, padding=190), 20),
    (Problem(1, 1, 1, 4, 4, 16, 2), 1),
]
LARGE = [
    (Problem(1, 28, 4, 128, 32, 128, 8192), 64),
    (Problem(2, 28, 4, 128, 32, 128, 4099, padding=4000), 256),
    (Problem(1, 32, 32, 512, 16, 128, 2049), 512),
    (Problem(1, 16, 16, 100, 4, 80, 3000), 63),
    (Problem(1, 16, 2, 64, 4, 192, 3000, value_dim=128), 65),
    (Problem(1, 8, 4, 256, 4, 256, 2500), 300),
    (Problem(2, 16, 16, 16, 1, 40, 2000), 1999),
]
RIDGE, STEPS = 3.0, 4
# What a product of numbers of these dtypes adds to the rounding of float32 sums: `attend` rounds its weights to them.
WEIGHT_ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def options(problem, device):
    return {"scaling": problem.head_dim**-0.5, "valid": problem.valid(device)}


def check(problem, count, device, dtype, kind=None):
    queries, _, keys = problem.tensors(device, dtype)
    values, kept, keywords = problem.values(device, dtype), problem.kept(count, device), options(problem, device)
    keywords |= problem.softmax_options(kind, device, dtype) if kind else {}
    outputs = attend(queries, keys, values, **keywords, backend="triton")
    exact = (exact_attention(queries, keys, **keywords).flatten(2, 3) @ values.double()).view(outputs.shape)
    assert outputs.dtype == torch.float32
    norms = queries.float().norm(dim=-1).max() * keys.float().norm(dim=-1).max()
    rounding = 4 * 2**-23 * max(norms.item() * keywords["scaling"], 1.0)
    assert relative_error(outputs, exact) <= rounding + WEIGHT_ROUNDING[dtype]
    steps = {"ridge": RIDGE, "steps": STEPS}
    # Both get the same outputs: they state what is to be reached.
    found, expected = (
        refit_values(queries, outputs, keys, values, kept, **keywords, **steps, backend=backend)
        for backend in ("triton", "torch")
    )
    assert found.shape == (*kept.shape, values.shape[3])
    assert found.dtype == dtype
    assert found.is_contiguous()
    # Conjugate gradients carry rounding on; what is stored is rounded to the dtype besides.
    stored = torch.finfo(dtype).eps
    assert relative_error(found, expected.double()) <= 100 * rounding + stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("problem", "count"), SMALL, ids=lambda part: getattr(part, "id", f"c{part}"))
def test_it_is_what_the_reference_says(problem, count, dtype, device):
    check(problem, count, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("problem", "count"), LARGE, ids=lambda part: getattr(part, "id", f"c{part}"))
def test_large_inputs_are_what_the_reference_says(problem, count, dtype):
    check(problem, count, torch.device("cuda"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("problem", "kind"), WITH_SINKS_OR_CAPPING, ids=lambda part: getattr(part, "id", part))
def test_learned_sinks_and_capped_logits(problem, kind, dtype, device):
    check(problem, problem.tokens // 2 + 1, device, dtype, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sinks", "softcap", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("problem", "count"), LARGE[1:5], ids=lambda part: getattr(part, "id", f"c{part}"))
def test_large_inputs_with_learned_sinks_and_capped_logits(problem, count, dtype, kind):
    check(problem, count, torch.device("cuda"), dtype, kind)


# With the last spread the squared attention to some tokens is too small for float32: it is not that of padding.
@pytest.mark.parametrize("spread", [2.0, 8.0, 40.0])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", [None, "both"])
def test_it_is_the_statement_in_float64(backend, spread, kind, device):
    problem, count = Problem(2, 6, 2, 12, 3, 16, 23, padding=5, value_dim=8), 7
    queries, _, keys = problem.tensors(device, spread=spread)
    values, kept, keywords = problem.values(device), problem.kept(count, device), options(problem, device)
    keywords |= problem.softmax_options(kind, device) if kind else {}
    outputs = attend(queries, keys, values, **keywords, backend=backend)
    found = refit_values(queries, outputs, keys, values, kept, **keywords, ridge=RIDGE, steps=40, backend=backend)
    arrays = [part.cpu().numpy().astype(np.float64) for part in (queries, keys, values)]
    valid = problem.valid("cpu").numpy()
    for row, head in np.ndindex(2, 2):
        heads = slice(3 * head, 3 * head + 3)
        sinks = keywords["sinks"][heads].cpu().double().numpy() if kind else None
        refit = method.Refit.of(
            arrays[0][row, heads],
            arrays[1][row, head],
            arrays[2][row, head],
            kept[row, head].tolist(),
            valid[row],
            method.Logits(0.25, keywords.get("softcap"), sinks),
            RIDGE,
        )
        np.testing.assert_allclose(found[row, head].cpu().numpy(), refit.values(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(dtype, device):
    problem = Problem(2, 4, 2, 16, 2, 32, 70)
    queries, _, keys = problem.tensors(device, dtype)
    values, kept, keywords = problem.values(device, dtype), problem.kept(20, device), options(problem, device)
    steps = {"ridge": RIDGE, "steps": STEPS}
    outputs = attend(queries, keys, values, **keywords, backend="triton")
    refitted = refit_values(queries, outputs, keys, values, kept, **keywords, **steps, backend="triton")
    tensors = queries, keys, values
    layouts = [
        [part.transpose(1, 2).contiguous().transpose(1, 2) for part in tensors],
        [part.transpose(2, 3).contiguous().transpose(2, 3) for part in tensors],
        [part.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for part in tensors],
        [torch.stack([part, part + 9], dim=3).flatten(2, 3)[:, :, ::2] for part in tensors],
        [torch.nn.functional.pad(part, (0, 1))[..., :-1] for part in tensors],
    ]
    small = 4 * torch.finfo(dtype).eps
    for layout in layouts:
        found = attend(*layout, **keywords, backend="triton")
        torch.testing.assert_close(found, outputs, atol=small, rtol=small)
        again = refit_values(layout[0], outputs, *layout[1:], kept, **keywords, **steps, backend="triton")
        torch.testing.assert_close(again, refitted, atol=small, rtol=small)


def missing(queries, outputs, keys, values, kept, refitted, *, scaling, valid):
    """The squared error of the queries' outputs from the kept tokens with these values."""
    take = kept.unsqueeze(-1)
    chosen = keys.gather(2, take.expand(-1, -1, -1, keys.shape[3]))
    logits = queries.double().unflatten(1, (keys.shape[1], -1)).flatten(2, 3) @ chosen.double().mT * scaling
    if valid is not None:
        padding = ~valid[:, None].expand(-1, kept.shape[1], -1).gather(2, kept)
        logits = logits.masked_fill(padding[:, :, None], -torch.inf)
    wanted = outputs.double().unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    return (logits.softmax(-1) @ refitted.double() - wanted).square().sum(dim=(2, 3))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(2, 40),
    kept=st.integers(1, 40),
    padding=st.integers(0, 39),
    kind=st.sampled_from(["plain", "repeated keys", "constant values", "one sink", "one query"]),
    ridge=st.sampled_from([0.01, 1.0, 3.0]),
    steps=st.integers(1, 12),
)
def test_it_is_never_worse_than_not_refitting(seed, tokens, kept, padding, kind, ridge, steps):
    generator = torch.Generator().manual_seed(seed)
    count, padding = min(kept, tokens), min(padding, tokens - 1)
    queries = torch.randn(1, 4, 1 if kind == "one query" else 9, 16, generator=generator) * 3
    keys = torch.randn(1, 2, tokens, 16, generator=generator)
    values = torch.randn(1, 2, tokens, 8, generator=generator)
    if kind == "repeated keys":
        keys = keys[:, :, :1].expand(-1, -1, tokens, -1)
    if kind == "constant values":
        values = values[:, :, :1].expand(-1, -1, tokens, -1)
    if kind == "one sink":
        keys[:, :, padding] = queries.mean(dim=(1, 2))[:, None] * 9
        values[:, :, padding] *= 0.01
    valid = torch.arange(tokens)[None] >= padding
    chosen = reference.keep_best(torch.rand(1, 2, tokens, generator=generator), count, valid)
    keywords = {"scaling": 0.25, "valid": valid}
    outputs = attend(queries, keys, values, **keywords)
    refitted = refit_values(queries, outputs, keys, values, chosen, **keywords, ridge=ridge, steps=steps)
    assert refitted.isfinite().all()
    plain = values.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, 8))
    before, after = (missing(queries, outputs, keys, values, chosen, part, **keywords) for part in (plain, refitted))
    assert (after <= before + 1e-5 * (1 + before)).all()
    # Slots of padding are left as they are.
    is_padding = ~valid[:, None].expand(-1, 2, -1).gather(2, chosen)
    assert refitted[is_padding].equal(plain[is_padding])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_is_not_finite_is_not_stored(backend, device):
    problem = Problem(1, 4, 2, 16, 2, 32, 70)
    queries, _, keys = problem.tensors(device)
    values, kept, keywords = problem.values(device), problem.kept(20, device), options(problem, device)
    first, last = kept[0, 0, 3], kept[0, 1, 19]
    keys[0, 0, first, 3] = values[0, 1, last, 5] = torch.nan
    keys[0, 1, kept[0, 1, 0] + 1] = torch.inf
    outputs = attend(queries, keys, values, **keywords, backend=backend)
    found = refit_values(queries, outputs, keys, values, kept, **keywords, ridge=RIDGE, steps=STEPS, backend=backend)
    assert outputs.isfinite().all()
    assert found.isfinite().all()


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    problem, device = Problem(1, 28, 4, 128, 32, 128, 3000), torch.device("cuda")
    queries, _, keys = problem.tensors(device, torch.bfloat16)
    values, kept = problem.values(device, torch.bfloat16), problem.kept(64, device)
    keywords = options(problem, device)

    def refit():
        outputs = attend(queries, keys, values, **keywords)
        return refit_values(queries, outputs, keys, values, kept, **keywords, ridge=RIDGE, steps=STEPS)

    expected = refit()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = refit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = refit()
    graph.replay()
    torch.cuda.synchronize()
    assert found.equal(expected)
    assert captured.equal(expected)
