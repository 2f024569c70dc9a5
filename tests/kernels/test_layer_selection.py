"""All steps of a layer's selection together, at the shapes of Qwen2.5-VL-7B, on a GPU."""

import pytest
import torch

from problems import Problem
from shiftkv_kernels import draw_samples, gather, group_mass, keep_best, token_statistics, vote

pytestmark = pytest.mark.gpu
QWEN = {"heads": 28, "kv_heads": 4, "proxies": 512, "groups": 32, "head_dim": 128}
MEBI = 2**20


def select(queries, last, keys, budget, backend, *, num_groups, scaling, valid):
    mass, last_mass = group_mass(
        queries, last, keys, num_groups=num_groups, scaling=scaling, valid=valid, backend=backend
    )
    return keep_best(vote(mass, 0.95, backend=backend) + last_mass, budget, valid, backend=backend)


@pytest.mark.parametrize("spread", [1.0, 4.0, 10.0])
@pytest.mark.parametrize("tokens", [1023, 4096, 12289])
def test_in_float32_the_selected_tokens_are_those_of_the_reference(tokens, spread):
    problem, device = Problem(2, **QWEN, tokens=tokens, padding=tokens // 3), torch.device("cuda")
    tensors, keywords = problem.tensors(device, spread=spread), problem.keywords(device)
    for budget in (64, 512):
        found, expected = (select(*tensors, budget, backend, **keywords) for backend in ("triton", "torch"))
        kept = (found[..., None] == expected[..., None, :]).any(-1)
        # Where rounding decides whether a group votes for one token more, one place in a head may go to another.
        assert kept.float().mean() >= 0.999, kept.float().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_sixteen_bits_they_are_those_of_the_reference_in_float32(dtype):
    problem, device = Problem(1, **QWEN, tokens=8192), torch.device("cuda")
    tensors, keywords = problem.tensors(device, dtype, spread=4.0), problem.keywords(device)
    found = select(*tensors, 64, "triton", **keywords)
    expected = select(*(part.float() for part in tensors), 64, "torch", **keywords)
    assert (found[..., None] == expected[..., None, :]).any(-1).float().mean() >= 0.995


def whole_selection(states, tensors, keywords, budget):
    queries, last, keys = tensors
    means, squares = token_statistics(states)
    options = {"count": 512, "features": 3584, "gamma": 10.0, "seed": 1, "stream": 2, "dtype": torch.bfloat16}
    samples = draw_samples(means, squares, **options, valid=keywords["valid"])
    room = keys.new_empty((2, *keys.shape[:2], budget + 9, keys.shape[3]))
    kept = select(queries, last, keys, budget, "auto", **keywords)
    return samples, *gather(keys, keys, kept, out=(room[0], room[1]))


def test_nothing_waits_for_the_device_and_a_graph_can_hold_it():
    problem, device = Problem(1, **QWEN, tokens=3000), torch.device("cuda")
    tensors, keywords = problem.tensors(device, torch.bfloat16), problem.keywords(device)
    states = torch.randn(1, 3000, 3584, device=device, dtype=torch.bfloat16)
    expected = whole_selection(states, tensors, keywords, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = whole_selection(states, tensors, keywords, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_selection(states, tensors, keywords, 64)
    graph.replay()
    torch.cuda.synchronize()
    for eager, again, replayed in zip(expected, found, captured, strict=True):
        assert torch.equal(eager, again)
        assert torch.equal(eager, replayed)


def test_it_takes_little_memory():
    problem, device = Problem(1, **QWEN, tokens=32768), torch.device("cuda")
    tensors, keywords = problem.tensors(device, torch.bfloat16), problem.keywords(device)
    states = torch.randn(1, 32768, 3584, device=device, dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole_selection(states, tensors, keywords, 64)
    assert torch.cuda.max_memory_allocated() - before <= 64 * MEBI


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
def test_it_runs_where_the_tensors_are():
    problem = Problem(1, 4, 2, 32, 4, 64, 200)
    with torch.cuda.device(0):
        found = select(*problem.tensors(torch.device("cuda", 1)), 20, "triton", **problem.keywords("cuda:1"))
    expected = select(*problem.tensors(torch.device("cuda", 0)), 20, "triton", **problem.keywords("cuda:0"))
    assert found.device.index == 1
    assert torch.equal(found.cpu(), expected.cpu())
