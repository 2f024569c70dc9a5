"""Time to first token and peak memory of a prefill, with DynamicCache and with ShiftKVCache, on random weights."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache

from benchmarks import report
from benchmarks.speed.decoding import synchronize
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache
from mmshiftkv.model.decoder import Decoder
from mmshiftkv.model.hooks import PrefillHooks


@dataclass(frozen=True)
class Prefill:
    """One cache at one prompt length: times in seconds, memory in bytes beyond what the model holds."""

    cache: str
    batch: int
    tokens: int
    seconds: float
    fastest: float
    slowest: float
    peak: int
    held: int


def run_once(model: Any, ids: torch.Tensor, make_cache: Callable[[], Cache]) -> tuple[float, int, int]:
    """Seconds of one prefill to its last token's logits, cache included; peak and remaining bytes (0 on a CPU)."""
    on_gpu = ids.device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(ids.device)
        before = torch.cuda.memory_allocated(ids.device)
    synchronize(ids.device)
    start = time.perf_counter()
    cache = make_cache()
    with torch.no_grad():
        logits = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits
    logits.argmax(-1).cpu()
    seconds = time.perf_counter() - start
    if not on_gpu:
        return seconds, 0, 0
    del logits
    return (
        seconds,
        torch.cuda.max_memory_allocated(ids.device) - before,
        torch.cuda.memory_allocated(ids.device) - before,
    )


def maker_of_asking(model: Any, budget: int) -> Callable[[], ShiftKVCache]:
    """Makes caches whose layers ask their modules for queries instead of rebuilding them."""
    # A decoder of its own: other caches of the model share theirs.
    decoder = Decoder(model, ShiftKVCache(model, budget=budget)._selected)
    decoder.attention = {index: layer.asking() for index, layer in decoder.attention.items()}

    def make() -> ShiftKVCache:
        cache = ShiftKVCache(model, budget=budget)
        cache._decoder, cache._hooks = decoder, PrefillHooks(decoder)
        cache.reset()
        return cache

    return make


def measure(model: Any, *, lengths: list[int], batches: list[int], budget: int, repeats: int) -> list[Prefill]:
    """Prefills of random tokens; the caches take turns, so that a drift of the machine falls on both."""
    device = model.device
    makers: dict[str, Callable[[], Cache]] = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        f"ShiftKVCache {budget}": lambda: ShiftKVCache(model, budget=budget),
        f"ShiftKVCache {budget}, asked": maker_of_asking(model, budget),
        f"ShiftKVCache {budget}, values": lambda: ShiftKVCache(
            model, budget=budget, preset="value-aware", refit_queries=0
        ),
        f"ShiftKVCache {budget}, value-aware": lambda: ShiftKVCache(model, budget=budget, preset="value-aware"),
    }
    cases = [(batch, tokens) for batch in batches for tokens in lengths]
    results = []
    with tqdm(total=len(cases) * (repeats + 2) * len(makers), unit="prefill") as progress:
        for batch, tokens in cases:
            generator = torch.Generator().manual_seed(tokens)
            vocabulary = model.config.get_text_config().vocab_size
            ids = torch.randint(3, vocabulary, (batch, tokens), generator=generator).to(device)
            runs: dict[str, list[tuple[float, int, int]]] = {name: [] for name in makers}
            for _ in range(repeats + 2):
                for name, make_cache in makers.items():
                    progress.set_description(f"{batch} x {tokens}, {name}")
                    runs[name].append(run_once(model, ids, make_cache))
                    progress.update()
            results += [_summary(name, batch, tokens, found[2:]) for name, found in runs.items()]
    return results


def _summary(name: str, batch: int, tokens: int, runs: list[tuple[float, int, int]]) -> Prefill:
    seconds = [run[0] for run in runs]
    return Prefill(
        name,
        batch,
        tokens,
        statistics.median(seconds),
        min(seconds),
        max(seconds),
        max(run[1] for run in runs),
        max(run[2] for run in runs),
    )


def table(results: Sequence[Prefill]) -> str:
    """One line a cache and length: median milliseconds, ratio to DynamicCache, peak and remaining MiB."""
    full = {(one.batch, one.tokens): one.seconds for one in results if one.cache == "DynamicCache"}
    cells = [
        [
            *(str(one.batch), str(one.tokens), one.cache),
            *(f"{1e3 * one.seconds:.1f}", f"{one.seconds / full[one.batch, one.tokens]:.3f}"),
            *(f"{one.peak / 2**20:.1f}", f"{one.held / 2**20:.1f}"),
        ]
        for one in results
    ]
    return report.table(["batch", "tokens", "cache", "ms", "ratio", "peak MiB", "held MiB"], cells, left=["cache"])
