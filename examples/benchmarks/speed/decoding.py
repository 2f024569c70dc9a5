"""Time per token and memory while `generate` decodes, with full caches and with compressed ones.

Time. A stopping criterion, the only thing added to the call, waits for the device and reads the clock once, at token
`UNTIMED`; the clock is read again when `generate` has returned and the device is done. The time between, divided by the
tokens in it, is what a token takes, with no prefill in it, no compilation and no recording of CUDA graphs. `generate`
itself waits for the device after every token, to ask whether it should go on, so the one wait more is no loss to it; a
loop that runs ahead of the device is timed rightly too. (The difference of two whole calls would have the noise of two
prefills, which take longer than all tokens where prompts are long; a streamer would copy every token to the host.) In
each step the criterion costs one kernel of a few microseconds. The model's own generation settings are put aside, so
that no token ends a text and no logits are processed.

Memory, on a GPU, as PyTorch's allocator counts it, beyond what was allocated before anything was compiled for the
cache: the peak of the whole call, activations of the prefill included, and what is allocated at the last token.
Besides, on any device, the bytes that the cache itself holds then, slots not yet filled included.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.speed.memory import allocated, free_unused, held_bytes, out_of_memory
from benchmarks.speed.rows import UNTIMED, Row
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, decode_ahead


@dataclass(frozen=True)
class CacheKind:
    """One way to decode.

    Attributes:
        name: as the table shows it.
        make_cache: (prompt tokens, new tokens) -> a new cache with room for them.
        generate: further keyword arguments of `generate`.
        compiled_by_length: whether its storage, and with it what is compiled, depends on the prompt's length.
    """

    name: str
    make_cache: Callable[[int, int], Cache]
    generate: Mapping[str, Any] = field(default_factory=dict)
    compiled_by_length: bool = False

    def decoding_on(self, device: torch.device, tokens: int, new_tokens: int) -> str:
        """What `generate` makes of it: "compiled" or "eager"."""
        cache = self.make_cache(tokens, new_tokens)
        compiled = device.type == "cuda" and type(cache) is not DynamicCache and cache.is_compileable
        return "compiled" if compiled else "eager"


def dynamic_kind(model: Any) -> CacheKind:
    """The cache that `generate` takes by itself."""
    return CacheKind("DynamicCache", lambda tokens, new: DynamicCache(config=model.config))


def static_kind(model: Any) -> CacheKind:
    """The full cache for compiled decoding."""
    return CacheKind(
        "StaticCache",
        lambda tokens, new: StaticCache(config=model.config, max_cache_len=tokens + new),
        compiled_by_length=True,
    )


def shiftkv_kind(model: Any, budget: int) -> CacheKind:
    """The compressed cache, with room for all new tokens."""
    return CacheKind(
        f"ShiftKVCache, budget {budget}", lambda tokens, new: ShiftKVCache(model, budget=budget, max_new_tokens=new)
    )


def decode_ahead_kind(kind: CacheKind) -> CacheKind:
    """The same cache, decoded by this package's own loop, and compiled by its own backend."""
    generate = {**kind.generate, "custom_generate": decode_ahead}
    return replace(kind, name=f"{kind.name}, decode_ahead", generate=generate)


@dataclass(frozen=True)
class Run:
    """One call of `generate`.

    Attributes:
        seconds: per token.
        cache_bytes: held by the cache after it.
        decoding_bytes, peak_bytes: allocated on the GPU, at the last token and at most; 0 without a GPU.
        graphs: compiled in it.
        cudagraph_skips: those of them that run without CUDA graphs.
    """

    seconds: float
    cache_bytes: int
    decoding_bytes: int
    peak_bytes: int
    graphs: int
    cudagraph_skips: int


@dataclass(frozen=True)
class Turn:
    """One run to come: of a cache, at a prompt length.

    Attributes:
        measured: False for the first run, which compiles.
        starts_anew: whether everything that was compiled is forgotten before it.
    """

    kind: CacheKind
    tokens: int
    measured: bool
    starts_anew: bool = False


class StepClock(StoppingCriteria):
    """Stops nothing; knows when token `UNTIMED` was there, and what is allocated at the last of `new_tokens`."""

    def __init__(self, batch: int, new_tokens: int, device: torch.device) -> None:
        self._not_done = torch.zeros(batch, dtype=torch.bool, device=device)
        self._last = new_tokens
        self.tokens = 0
        self.start = 0.0
        self.allocated = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Counts a token."""
        self.tokens += 1
        if self.tokens == self._last:
            self.allocated = allocated(self._not_done.device)
        if self.tokens == UNTIMED:
            synchronize(self._not_done.device)
            self.start = time.perf_counter()
        return self._not_done


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compilations() -> tuple[int, int]:
    """Graphs that torch.compile has made so far, and how many of them run without CUDA graphs."""
    return counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]


def random_prompt(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """Ids (batch, tokens) of text, the same at every call; none has a meaning of its own, as an image's would."""
    special: set[int] = set()
    for config in (model.config, model.config.get_text_config()):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                special.update(value if isinstance(value, list) else [value])
    ordinary = torch.tensor([one for one in range(model.config.get_text_config().vocab_size) if one not in special])
    chosen = torch.randint(len(ordinary), (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    return ordinary[chosen].to(model.device)


def run_once(model: Any, kind: CacheKind, ids: torch.Tensor, new_tokens: int) -> Run:
    """Generates exactly `new_tokens` (more than `UNTIMED`) behind the prompts `ids`, with a new cache.

    Raises:
        RuntimeError: another number of tokens came out, or the loop did not ask the stopping criteria each time.
    """
    device = ids.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    graphs, skips = compilations()
    clock = StepClock(ids.shape[0], new_tokens, device)
    cache = kind.make_cache(ids.shape[1], new_tokens)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
        **kind.generate,
    )
    synchronize(device)
    seconds = time.perf_counter() - clock.start
    generated = output.shape[1] - ids.shape[1]
    if (generated, clock.tokens) != (new_tokens, new_tokens):
        raise RuntimeError(
            f"{kind.name}: {generated} tokens and {clock.tokens} checks whether to stop, not {new_tokens}"
        )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    compiled = compilations()
    return Run(
        seconds / (new_tokens - UNTIMED),
        held_bytes(cache),
        clock.allocated,
        peak,
        graphs=compiled[0] - graphs,
        cudagraph_skips=compiled[1] - skips,
    )


def schedule(
    kinds: Sequence[CacheKind], compiled: Collection[str], lengths: Sequence[int], repeats: int
) -> Iterator[Turn]:
    """The turns of one batch size, in order.

    torch.compile keeps what it compiled for the whole process. When it meets a second size where it has seen another,
    it compiles for any size, which is slower, and after a few more it gives up; so each cache that is compiled starts
    with nothing, or the others' sizes, and StaticCache's own at other lengths, would count against it. Only
    everything can be forgotten at once. Therefore a compiled cache has all lengths one after another: StaticCache
    starts anew at each; ShiftKVCache only at the first, since its one compilation has to serve them all. Caches for
    which nothing is compiled neither mind nor disturb: their runs are spread over the others', so that if the machine
    gets faster or slower meanwhile, their fastest and slowest runs show it.
    """
    owners: list[CacheKind | None] = [kind for kind in kinds if kind.name in compiled]
    guests = [kind for kind in kinds if kind.name not in compiled]
    owners = owners or [None]
    for place, owner in enumerate(owners):
        for tokens in lengths:
            for run in range(repeats + 1):
                if owner is not None:
                    is_first = owner.compiled_by_length or tokens == lengths[0]
                    yield Turn(owner, tokens, run > 0, run == 0 and is_first)
                if place == (max(run - 1, 0) % len(owners)):
                    yield from (Turn(guest, tokens, run > 0) for guest in guests)


class Measurement:
    """The runs of all caches at one batch size."""

    def __init__(
        self, model: Any, kinds: Sequence[CacheKind], batch: int, lengths: Sequence[int], new_tokens: int
    ) -> None:
        self._model = model
        self._kinds = kinds
        self._batch = batch
        self._lengths = lengths
        self._new_tokens = new_tokens
        self._device: torch.device = model.device
        self._decoding = {kind.name: kind.decoding_on(self._device, lengths[0], new_tokens) for kind in kinds}
        self._runs: dict[tuple[str, int], list[Run]] = {}  # by name and length; the first one is not measured
        self._out_of_memory: set[tuple[str, int]] = set()
        self._empty_bytes = 0  # allocated when everything compiled was forgotten the last time
        self._tokens = lengths[0]

    def turns(self, repeats: int) -> list[Turn]:
        """What to run, in order."""
        compiled = [name for name, decoding in self._decoding.items() if decoding == "compiled"]
        return list(schedule(self._kinds, compiled, self._lengths, repeats))

    def run(self, turn: Turn) -> None:
        """Runs it, unless the same has run out of memory before."""
        key = turn.kind.name, turn.tokens
        if turn.starts_anew:
            self._start_anew()
        elif turn.tokens != self._tokens:
            free_unused(self._device)
        self._tokens = turn.tokens
        if key in self._out_of_memory:
            return
        if self._device.type == "cuda":
            gc.collect()  # so that nothing of the last run counts
        # What is compiled for a cache counts as its own memory, and is nothing of the others'.
        before = self._empty_bytes if self._decoding[turn.kind.name] == "compiled" else allocated(self._device)
        run = self._attempt(turn)
        if run is None:
            self._out_of_memory.add(key)
            free_unused(self._device)
            return
        run = replace(run, decoding_bytes=run.decoding_bytes - before, peak_bytes=run.peak_bytes - before)
        self._runs.setdefault(key, []).append(run)

    def _attempt(self, turn: Turn) -> Run | None:
        """The run, or None if it needs more memory than the GPU has."""
        try:
            ids = random_prompt(self._model, self._batch, turn.tokens)
            return run_once(self._model, turn.kind, ids, self._new_tokens)
        except Exception as error:
            reason = out_of_memory(error)
            if reason is None:
                raise
            tqdm.write(f"{turn.kind.name}, {self._batch} x {turn.tokens}: {reason}", file=sys.stderr)
            return None

    def _start_anew(self) -> None:
        torch._dynamo.reset()
        if self._device.type == "cuda":
            # A ShiftKVCache leaves its storage to the model's next one; one of another size lets go of it, so that it
            # does not count as another cache's.  This also makes the workspaces that stay, before memory is read.
            ids = random_prompt(self._model, 1, 4)
            small = ShiftKVCache(self._model, budget=1, max_new_tokens=1)
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: small}, max_new_tokens=1, do_sample=False
            )
            del small
        free_unused(self._device)
        self._empty_bytes = allocated(self._device)

    def rows(self) -> list[Row]:
        """The results, length by length."""
        return [self._row(kind.name, tokens) for tokens in self._lengths for kind in self._kinds]

    def _row(self, name: str, tokens: int) -> Row:
        case = Row(name, self._batch, tokens, self._new_tokens, self._decoding[name])
        if (name, tokens) in self._out_of_memory:
            return replace(case, error="out of memory")
        first, *runs = self._runs[name, tokens]
        milliseconds = [1e3 * run.seconds for run in runs]
        on_gpu = self._device.type == "cuda"
        return replace(
            case,
            milliseconds=statistics.median(milliseconds),
            fastest=min(milliseconds),
            slowest=max(milliseconds),
            tokens_per_second=self._batch * 1e3 / statistics.median(milliseconds),
            cache_bytes=max(run.cache_bytes for run in runs),
            decoding_bytes=max(run.decoding_bytes for run in runs) if on_gpu else None,
            peak_bytes=max(run.peak_bytes for run in runs) if on_gpu else None,
            graphs=first.graphs,
            graphs_while_measured=sum(run.graphs for run in runs),
            cudagraph_skips=sum(run.cudagraph_skips for run in (first, *runs)),
        )


def measure(
    model: Any,
    kinds: Sequence[CacheKind],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    new_tokens: int,
    repeats: int,
) -> Iterator[list[Row]]:
    """The rows of each batch size in turn, each from `repeats` runs; progress goes to stderr.

    The model's generation settings are replaced by the plainest ones.
    """
    model.generation_config = GenerationConfig()
    measurements = [Measurement(model, kinds, batch, lengths, new_tokens) for batch in batches]
    total = sum(len(measurement.turns(repeats)) for measurement in measurements)
    with tqdm(total=total, unit="run") as progress:
        for batch, measurement in zip(batches, measurements, strict=True):
            for turn in measurement.turns(repeats):
                progress.set_description(f"{batch} x {turn.tokens}, {turn.kind.name}")
                measurement.run(turn)
                progress.update()
            yield measurement.rows()
