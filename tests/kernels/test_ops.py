"""What the public operations refuse, and where they run."""

import math
import re

import pytest
import torch

from shiftkv_kernels import (
    attend_token,
    draw_samples,
    gather,
    group_mass,
    keep_best,
    project_gate,
    project_token,
    rotate_queries,
    token_statistics,
    vote,
)
from shiftkv_kernels import device as devices

Q, LAST, K = torch.randn(2, 4, 8, 16), torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16)
MASS, SCORES = torch.rand(2, 2, 3, 9), torch.rand(2, 2, 9)
VALID = torch.ones(2, 9, dtype=torch.bool)
COS = torch.randn(2, 1, 16)
STEPS = torch.randn(4, 16)
STATISTICS = torch.rand(2, 9)
STATES = torch.ones(2, 9, 4)
SAMPLING = {"count": 4, "features": 6, "gamma": 1.0, "seed": 0, "stream": 0, "dtype": torch.float32}
INDICES = torch.zeros(2, 2, 3, dtype=torch.int64)
STATE, WEIGHT, BIAS = torch.randn(1, 1, 6), torch.randn(5, 6), torch.randn(5)
ROOM = torch.full((2, 2, 4, 16), torch.nan)


def mass_of(queries=Q, last=LAST, keys=K, num_groups=2, scaling=0.25, **more):
    return group_mass(queries, last, keys, num_groups=num_groups, scaling=scaling, **more)


def gather_into(*out):
    return gather(K, K, INDICES, out=out)


QUERY, SLOTS = torch.randn(1, 4, 1, 8), (torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
REFUSED = {
    "proxy_queries has shape (4, 8, 16), must be (B, H, N, D)": lambda: mass_of(Q[0]),
    "last_query has shape (2, 4, 2, 16), must be (B, H, 1, D) = (2, 4, 1, 16)": lambda: mass_of(last=Q[:, :, :2]),
    "last_query is torch.float16, must be torch.float32": lambda: mass_of(last=LAST.half()),
    "keys is torch.float64, must be torch.float32": lambda: mass_of(keys=K.double()),
    "keys has shape (2, 2, 9, 8), must be (B, H_kv, T, D) = (2, any, any, 16)": lambda: mass_of(keys=K[..., :8]),
    "keys has shape (1, 2, 9, 16)": lambda: mass_of(keys=K[:1]),
    "keys has no tokens": lambda: mass_of(keys=K[:, :, :0]),
    "keys has 3 heads, must have a divisor of the 4 heads of proxy_queries": lambda: mass_of(
        keys=torch.randn(2, 3, 9, 16)
    ),
    "num_groups=3 must be a divisor of the 8 proxies": lambda: mass_of(num_groups=3),
    "num_groups=0 must be a divisor": lambda: mass_of(num_groups=0),
    "scaling=-1.0 must be more than 0": lambda: mass_of(scaling=-1.0),
    "scaling=inf must be more than 0, and finite": lambda: mass_of(scaling=float("inf")),
    "softcap=0.0 must be more than 0": lambda: mass_of(softcap=0.0),
    "softcap=inf must be more than 0, and finite": lambda: mass_of(softcap=float("inf")),
    "sinks has shape (2,), must be (H,) = (4)": lambda: mass_of(sinks=torch.zeros(2)),
    "sinks is torch.int64, must be of a floating dtype": lambda: mass_of(sinks=torch.zeros(4, dtype=torch.int64)),
    "sinks is on meta, must be on cpu like proxy_queries": lambda: mass_of(sinks=torch.zeros(4, device="meta")),
    "valid has shape (2, 8), must be (B, T) = (2, 9)": lambda: mass_of(valid=VALID[:, 1:]),
    "valid is torch.int64, must be torch.bool": lambda: mass_of(valid=VALID.long()),
    "keys is on meta, must be on cpu like proxy_queries": lambda: mass_of(keys=K.to("meta")),
    "backend='cuda' must be one of 'auto', 'triton', 'torch'": lambda: mass_of(backend="cuda"),
    "mass has shape (2, 2, 9), must be (B, H_kv, G, T)": lambda: vote(SCORES, 0.5),
    "mass is torch.float16, must be torch.float32": lambda: vote(MASS.half(), 0.5),
    "threshold=0.0 must be more than 0 and at most 1": lambda: vote(MASS, 0.0),
    "threshold=1.5 must be more than 0 and at most 1": lambda: vote(MASS, 1.5),
    "scores has shape (2, 2, 3, 9), must be (B, H_kv, T)": lambda: keep_best(MASS, 2),
    "count=10 must be from 1 to the 9 tokens": lambda: keep_best(SCORES, 10),
    "count=0 must be from 1 to the 9 tokens": lambda: keep_best(SCORES, 0),
    "scores is torch.float64": lambda: keep_best(SCORES.double(), 2),
    "valid has shape (1, 9)": lambda: keep_best(SCORES, 2, VALID[:1]),
    "values has shape (2, 2, 8, 16), must be (B, H_kv, T, D_v) = (2, 2, 9, any)": lambda: gather(
        K, K[:, :, 1:], INDICES
    ),
    "indices is torch.int32, must be torch.int64": lambda: gather(K, K, INDICES.int()),
    "indices has shape (2, 1, 3)": lambda: gather(K, K, INDICES[:, :1]),
    "out[0] has shape (2, 2, 16), must be (B, H_kv, S, D) = (2, 2, any, 16)": lambda: gather_into(ROOM[:, :, 0], ROOM),
    "out[0] has shape (1, 2, 4, 16)": lambda: gather_into(ROOM[:1], ROOM),
    "out[1] has shape (2, 2, 4, 8), must be (B, H_kv, S, D_v) = (2, 2, 4, 16)": lambda: gather_into(
        ROOM, ROOM[..., :8]
    ),
    "out[1] has shape (2, 2, 3, 16)": lambda: gather_into(ROOM, ROOM[:, :, 1:]),
    "out has 2 slots, must have at least as many as the 3 tokens of indices": lambda: gather_into(
        ROOM[:, :, 2:], ROOM[:, :, 2:]
    ),
    "out[0] is torch.float16, must be torch.float32": lambda: gather_into(ROOM.half(), ROOM),
    "out[1] is torch.float64, must be torch.float32": lambda: gather_into(ROOM, ROOM.double()),
    "out[0] is on meta, must be on cpu like keys": lambda: gather_into(ROOM.to("meta"), ROOM),
    "out[1] is on meta, must be on cpu like values": lambda: gather_into(ROOM, ROOM.to("meta")),
    "out[0] has strides (128, 64, 1, 4), must be contiguous": lambda: gather_into(ROOM.mT.contiguous().mT, ROOM),
    "out[1] has strides (0, 0, 0, 0), must be contiguous": lambda: gather_into(
        ROOM, ROOM[:1, :1, :1, :1].expand_as(ROOM)
    ),
    "hidden_states has shape (2, 9), must be (B, t, d)": lambda: token_statistics(STATISTICS),
    "last has shape (2, 4), must be (B, 1, d) = (2, 1, 4)": lambda: token_statistics(STATES, last=STATES[:, 0]),
    "last is torch.float64, must be torch.float32": lambda: token_statistics(STATES, last=STATES[:, :1].double()),
    "last is on meta, must be on cpu like hidden_states": lambda: token_statistics(
        STATES, last=STATES[:, :1].to("meta")
    ),
    "last has strides (36, 4, 1), must be contiguous": lambda: token_statistics(STATES, last=STATES[:, :1]),
    "squares has shape (2, 8), must be (B, T) = (2, 9)": lambda: draw_samples(
        STATISTICS, STATISTICS[:, 1:], **SAMPLING
    ),
    "means is torch.float64": lambda: draw_samples(STATISTICS.double(), STATISTICS, **SAMPLING),
    "seed=-1 must be from 0 to 4294967295": lambda: draw_samples(STATISTICS, STATISTICS, **{**SAMPLING, "seed": -1}),
    "count=0 must be more than 0": lambda: draw_samples(STATISTICS, STATISTICS, **{**SAMPLING, "count": 0}),
    "cos has 15 features, must have an even number": lambda: rotate_queries(Q, LAST, COS[..., 1:], COS, STEPS, STEPS),
    "cos has shape (3, 1, 16), must be (B or 1, 1, rotary dim)": lambda: rotate_queries(
        Q, LAST, torch.cat([COS, COS[:1]]), COS, STEPS, STEPS
    ),
    "sin has shape (1, 1, 16), must be the shape of cos": lambda: rotate_queries(Q, LAST, COS, COS[:1], STEPS, STEPS),
    "state has shape (17, 1, 6), must be (..., K) with 1 to 16 rows in all": lambda: project_token(
        STATE.repeat(17, 1, 1), [WEIGHT], [BIAS]
    ),
    "state has shape (2, 9, 6), must be (..., K)": lambda: project_token(STATE.repeat(2, 9, 1), [WEIGHT], [BIAS]),
    "state has shape (0, 1, 6), must be (..., K)": lambda: project_token(STATE[:0], [WEIGHT], [BIAS]),
    "state has shape (1, 1, 0), must be (..., K)": lambda: project_token(STATE[..., :0], [WEIGHT[:, :0]], [BIAS]),
    "state has shape (), must be": lambda: project_token(torch.tensor(1.0), [WEIGHT], [BIAS]),
    "state has strides (0, 6, 1), must be contiguous": lambda: project_token(STATE.expand(2, 1, 6), [WEIGHT], [BIAS]),
    "state has strides (12, 12, 2), must be contiguous": lambda: project_token(
        torch.randn(1, 1, 12)[..., ::2], [WEIGHT], [BIAS]
    ),
    "biases has 2 entries, must have one for each of the 1 weights": lambda: project_token(
        STATE, [WEIGHT], [None, BIAS]
    ),
    "weights[1] has shape (5, 5), must be (N, K) = (any, 6)": lambda: project_token(
        STATE, [WEIGHT, WEIGHT[:, 1:]], [None, None]
    ),
    "weights[0] has strides (1, 5), must be contiguous": lambda: project_token(
        STATE, [WEIGHT.T.contiguous().T], [BIAS]
    ),
    "weights[0] is torch.float16, must be torch.float32": lambda: project_token(STATE, [WEIGHT.half()], [BIAS]),
    "weights[0] is on meta, must be on cpu like state": lambda: project_token(STATE, [WEIGHT.to("meta")], [BIAS]),
    "biases[0] has shape (6,), must be (N,) = (5)": lambda: project_token(STATE, [WEIGHT], [STATE[0, 0]]),
    "biases[1] is torch.float64": lambda: project_token(STATE, [WEIGHT, WEIGHT], [BIAS, BIAS.double()]),
    "norm[0] has shape (5,), must be (K,) = (6)": lambda: project_token(STATE, [WEIGHT], [BIAS], (BIAS, 1e-5)),
    "norm[0] is torch.float64, must be torch.float32": lambda: project_token(
        STATE, [WEIGHT], [BIAS], (WEIGHT[0].double(), 1e-5)
    ),
    "norm[1]=-0.1 must be at least 0, and finite": lambda: project_token(STATE, [WEIGHT], [BIAS], (WEIGHT[0], -0.1)),
    "norm[1]=nan must be": lambda: project_gate(STATE, 2 * [WEIGHT], 2 * [BIAS], (WEIGHT[0], math.nan)),
    "residual is added to the output of one layer, weights has 2 entries": lambda: project_token(
        STATE, [WEIGHT, WEIGHT], [BIAS, BIAS], residual=STATE[..., :5]
    ),
    "residual has shape (1, 1, 6), must be (..., N) = (1, 1, 5)": lambda: project_token(
        STATE, [WEIGHT], [BIAS], residual=STATE
    ),
    "residual is torch.float16, must be torch.float32": lambda: project_token(
        STATE, [WEIGHT], [BIAS], residual=STATE[..., :5].half()
    ),
    "residual has strides (5, 5, 2), must be contiguous": lambda: project_token(
        STATE, [WEIGHT], [BIAS], residual=torch.zeros(1, 1, 10)[..., ::2].as_strided((1, 1, 5), (5, 5, 2))
    ),
    "norm: state has shape (2, 1, 6), must have one row": lambda: project_token(
        STATE.repeat(2, 1, 1), [WEIGHT], [BIAS], (WEIGHT[0], 1e-5)
    ),
    "residual: state has shape (2, 1, 6), must have one row": lambda: project_token(
        STATE.repeat(2, 1, 1), [WEIGHT], [BIAS], residual=STATE
    ),
    "weights of a gate: state has shape (2, 1, 6), must have one row": lambda: project_gate(
        STATE.repeat(2, 1, 1), 2 * [WEIGHT], 2 * [BIAS]
    ),
    "weights has 1 entries, must have two": lambda: project_gate(STATE, [WEIGHT], [BIAS]),
    "weights[1] has shape (4, 6), must be (N, K) = (5, 6)": lambda: project_gate(
        STATE, [WEIGHT, WEIGHT[:4]], [None, None]
    ),
    "state has shape (17, 1, 6), must be": lambda: project_gate(STATE.repeat(17, 1, 1), 2 * [WEIGHT], 2 * [BIAS]),
    "query has shape (1, 4, 2, 8), must be (B, H, 1, D)": lambda: attend_token(
        QUERY.repeat(1, 1, 2, 1), *SLOTS, None, 1
    ),
    "query has 3 heads, must have a multiple of the 2 heads of keys": lambda: attend_token(
        QUERY[:, 1:], *SLOTS, None, 1
    ),
    "keys is torch.float16": lambda: attend_token(QUERY, SLOTS[0].half(), SLOTS[1], None, 1),
    "values has shape (1, 2, 4, 8)": lambda: attend_token(QUERY, SLOTS[0], SLOTS[1][:, :, 1:], None, 1),
    "values has strides (80, 40, 1, 5), must have 1 in the last place": lambda: attend_token(
        QUERY, SLOTS[0], SLOTS[1].mT.contiguous().mT, None, 1
    ),
    "mask has shape (1, 4, 1, 5), must be (B or 1, 1, 1, S)": lambda: attend_token(
        QUERY, *SLOTS, torch.ones(1, 4, 1, 5, dtype=torch.bool), 1
    ),
    "mask is torch.int64": lambda: attend_token(QUERY, *SLOTS, torch.ones(1, 1, 1, 5, dtype=torch.int64), 1),
    "step_sin has shape (3, 16)": lambda: rotate_queries(Q, LAST, COS, COS, STEPS, STEPS[1:]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_that_do_not_fit_are_named(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        REFUSED[message]()


@pytest.mark.parametrize(
    ("out", "found"),
    [
        (ROOM, "a Tensor"),
        ([ROOM, ROOM], "a list"),
        ((ROOM,), "a tuple (Tensor)"),
        ((ROOM, None), "a tuple (Tensor, NoneType)"),
    ],
)
def test_only_a_pair_can_be_gathered_into(out, found):
    with pytest.raises(TypeError, match=re.escape(f"out is {found}, must be a tuple of two tensors")):
        gather(K, K, INDICES, out=out)


def test_refused_storage_is_not_written():
    untouched = torch.full_like(ROOM, 7)
    with pytest.raises(ValueError, match=re.escape("out[1]")):
        gather_into(untouched, ROOM.half())
    assert (untouched == 7).all()


def test_on_a_cpu_only_the_reference_runs_unless_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(devices, "is_interpreted", lambda: False)
    for backend in ("auto", "torch"):
        assert not devices.takes_triton(backend, torch.device("cpu"))
    with pytest.raises(ValueError, match=r'backend="triton" cannot be used: the tensors are on cpu'):
        vote(MASS, 0.5, backend="triton")
    monkeypatch.setattr(devices, "is_interpreted", lambda: True)
    assert devices.takes_triton("triton", torch.device("cpu"))
    assert not devices.takes_triton("auto", torch.device("cpu"))


def test_without_triton_the_reference_runs(monkeypatch):
    monkeypatch.setattr(devices, "triton", None)
    assert vote(MASS, 0.5).shape == (2, 2, 9)
    with pytest.raises(ValueError, match="Triton is not installed"):
        vote(MASS, 0.5, backend="triton")


def test_triton_is_not_for_all_tensors(device):
    wide = torch.randn(1, 1, 2, 512, device=device)
    with pytest.raises(ValueError, match="a head dim of 512 is more than 256"):
        mass_of(wide, wide[:, :, :1], wide, backend="triton")
    double = wide[..., :16].double()
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        mass_of(double, double[:, :, :1], double, backend="triton")
    with pytest.raises(ValueError, match=r"it multiplies torch\.float32, .*, not torch\.float64"):
        project_token(double[0, 0, :1], [double[0, 0]], [None], backend="triton")
    assert project_token(double[0, 0, :1], [double[0, 0]], [None])[0].shape == (1, 2)
    for part in (wide, double):
        assert mass_of(part, part[:, :, :1], part)[0].shape == (1, 1, 2, 2)


@pytest.mark.gpu
def test_on_a_gpu_triton_runs():
    assert devices.takes_triton("auto", torch.device("cuda"))
    assert not devices.takes_triton("torch", torch.device("cuda"))
