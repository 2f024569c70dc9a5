"""What calls cost a device: time, memory and launches, and the rates that it reaches."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(calls: list[Callable[[], Any]], device: torch.device, *, graph: bool, repeats: int) -> float:
    """Median time of one of the calls, run one after another; from a graph, launches cost the host nothing."""
    for call in calls:
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times) / len(calls)
    torch.cuda.synchronize()
    run = _captured(calls) if graph else lambda: [call() for call in calls]
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start_event, end_event in events:
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / len(calls)


def _captured(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def extra_mebibytes(call: Callable[[], Any], device: torch.device) -> float:
    """Peak memory of a call beyond what was held before it; 0 on a CPU."""
    if device.type != "cuda":
        call()
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measured_rates(device: torch.device) -> tuple[float, float]:
    """Matrix products in FLOP/s (bfloat16, random data) and copies in bytes/s, read and written."""
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    left, right = torch.randn(2, size, size, device=device, dtype=kind)
    product = milliseconds([lambda: torch.mm(left, right)], device, graph=False, repeats=20)
    source = torch.empty(2**32 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = milliseconds([lambda: target.copy_(source)], device, graph=False, repeats=20)
    return 2 * size**3 / product * 1e3, 2 * source.numel() / copy * 1e3


def launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """How many kernels and copies a call starts on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
