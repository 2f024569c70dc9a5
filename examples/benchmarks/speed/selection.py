"""What one layer's selection costs, step by step, at the shapes of Qwen2.5-VL-7B with random weights.

The published steps, and those that count values, without and with refitted values. Beside the published ones the same
selection with the whole attention of the proxies in memory, as it was published, and the least time that the operations
and bytes need at the rates measured here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import report
from benchmarks.speed.device_work import extra_mebibytes, launches, milliseconds
from mmshiftkv.methods.shiftkv import REFIT_STEPS
from shiftkv_kernels import (
    attend,
    draw_samples,
    gather,
    group_mass,
    keep_best,
    refit_values,
    rotate_queries,
    token_statistics,
    value_scores,
    vote,
)

MASS = 0.95
GAMMA = 10.0
LAST_QUERY_WEIGHT = 4.0
RIDGE = 3.0
COLD_BYTES = 256 * 2**20  # several times the L2 cache, so that every layer finds its data in memory


@dataclass(frozen=True)
class Shapes:
    """Sizes of a decoder layer and of its selection."""

    hidden: int = 3584
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    proxies: int = 512
    groups: int = 32
    refitted_to: int = 128  # proxies of each query head
    budget: int = 64


TINY = Shapes(hidden=32, heads=4, kv_heads=2, head_dim=16, proxies=16, groups=4, refitted_to=8, budget=8)


class Layer:
    """One layer's tensors after its prompt was attended to, and the steps of its selection, in order."""

    def __init__(
        self, shapes: Shapes, batch: int, tokens: int, device: torch.device, dtype: torch.dtype, backend: str
    ) -> None:
        self.shapes = shapes
        self.backend = backend
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        query_features = shapes.heads * shapes.head_dim
        self.states = torch.randn(batch, tokens, shapes.hidden, **like)
        self.weight = torch.randn(query_features, shapes.hidden, **like) / math.sqrt(shapes.hidden)
        self.bias = torch.randn(query_features, **like)
        self.keys = torch.randn(batch, shapes.kv_heads, tokens, shapes.head_dim, **like)
        self.values = torch.randn_like(self.keys)
        frequencies = 1e6 ** -(
            torch.arange(shapes.head_dim, device=device) % (shapes.head_dim // 2) * 2 / shapes.head_dim
        )
        members = torch.arange(1, shapes.proxies // shapes.groups + 1, device=device)
        here = (frequencies * tokens)[None, None]
        steps = frequencies * (members * shapes.groups)[:, None]
        self.cos, self.sin = here.cos().to(dtype), here.sin().to(dtype)
        self.step_cos, self.step_sin = steps.cos(), steps.sin()
        self._inputs = {*vars(self), "_inputs"}

    @property
    def bytes(self) -> int:
        """What a selection reads: states, projection and keys."""
        return sum(part.numel() * part.element_size() for part in (self.states, self.weight, self.keys))

    def forget(self) -> None:
        """Frees what the steps have made."""
        for name in set(vars(self)) - self._inputs:
            delattr(self, name)

    def statistics(self) -> None:
        """Mean and spread of each token's features, and a copy of the last token's state."""
        self.last_state = torch.empty_like(self.states[:, -1:], memory_format=torch.contiguous_format)
        found = token_statistics(self.states, last=self.last_state, backend=self.backend)
        self.token_means, self.token_squares = found

    def samples(self) -> None:
        """Variance-expanded samples, and the last token's state behind them."""
        self.drawn = draw_samples(
            self.token_means,
            self.token_squares,
            count=self.shapes.proxies,
            features=self.shapes.hidden,
            gamma=GAMMA,
            seed=0,
            stream=0,
            dtype=self.states.dtype,
            last=self.last_state,
            backend=self.backend,
        )

    def projection(self) -> None:
        """Query projection of both."""
        self.projected = F.linear(self.drawn, self.weight, self.bias)

    def rotation(self) -> None:
        """Rotation of both to their positions."""
        queries = self.projected.unflatten(-1, (self.shapes.heads, -1)).transpose(1, 2)
        factors = self.cos, self.sin, self.step_cos, self.step_sin
        self.proxies, self.last = rotate_queries(queries[:, :, :-1], queries[:, :, -1:], *factors, backend=self.backend)

    def masses(self) -> None:
        """Attention mass of each group on each token."""
        self.mass, self.last_mass = group_mass(
            self.proxies,
            self.last,
            self.keys,
            num_groups=self.shapes.groups,
            scaling=self.shapes.head_dim**-0.5,
            backend=self.backend,
        )

    def votes(self) -> None:
        """Scores: votes and the last query's mass."""
        self.scores = vote(self.mass, MASS, self.last_mass, backend=self.backend)

    def values_given(self) -> None:
        """Scores: what each token gives to the proxies' and the last query's outputs."""
        self._score_values(None)

    def values_and_sinks(self) -> None:
        """The same scores, and which KV heads have an attention sink."""
        self.has_sink = self.keys.new_empty(self.keys.shape[:2], dtype=torch.bool)
        self._score_values(self.has_sink)

    def _score_values(self, has_sink: torch.Tensor | None) -> None:
        self.scores = value_scores(
            self.proxies,
            self.last,
            self.keys,
            self.values,
            scaling=self.shapes.head_dim**-0.5,
            last_weight=LAST_QUERY_WEIGHT,
            has_sink=has_sink,
            backend=self.backend,
        )

    def kept(self) -> None:
        """Indices of the kept tokens."""
        self.indices = keep_best(self.scores, self.shapes.budget, backend=self.backend)

    def storage(self) -> None:
        """Kept keys and values in storage of their own."""
        self.stored = gather(self.keys, self.values, self.indices, backend=self.backend)

    def refit(self) -> None:
        """Values refitted to the kept tokens, but for those of heads with a sink."""
        queries, scaling = self.proxies[:, :, : self.shapes.refitted_to], self.shapes.head_dim**-0.5
        outputs = attend(queries, self.keys, self.values, scaling=scaling, backend=self.backend)
        self.refitted = refit_values(
            queries,
            outputs,
            self.keys,
            self.values,
            self.indices,
            scaling=scaling,
            ridge=RIDGE,
            steps=REFIT_STEPS,
            unchanged=self.has_sink,
            backend=self.backend,
        )

    def select(self, method: str) -> None:
        """All steps of a method."""
        for step in STEPS[method]:
            getattr(self, step)()

    def select_materialized(self) -> None:
        """Steps 4 to 6 with the attention of all proxies, of every head, in memory at once."""
        shapes = self.shapes
        keys = self.keys.repeat_interleave(shapes.heads // shapes.kv_heads, dim=1)
        logits = torch.cat([self.proxies, self.last], dim=2) @ keys.transpose(-1, -2) * shapes.head_dim**-0.5
        weights = logits.softmax(-1, dtype=torch.float32).to(logits.dtype)
        weights = weights.unflatten(1, (shapes.kv_heads, -1)).mean(2)[..., :-1].float()
        last_mass = weights[:, :, -1]
        grouped = weights[:, :, :-1].unflatten(2, (shapes.groups, -1)).sum(3)
        size = shapes.proxies // shapes.groups
        mass, order = ((grouped + last_mass.unsqueeze(2)) / (1 + size)).sort(dim=-1, descending=True)
        reached = mass.cumsum(-1)
        needed = reached - mass < MASS * reached[..., -1:]
        votes = torch.zeros_like(mass).scatter_(-1, order, needed.float()).sum(2)
        best = (votes + last_mass).topk(shapes.budget - 1).indices.sort(-1).values
        self.indices = F.pad(best, (0, 1), value=self.keys.shape[2] - 1)
        self.storage()

    def topk(self) -> None:
        """`keep_best` by `torch.topk`, which promises nothing about ties."""
        best = self.scores[..., :-1].topk(self.shapes.budget - 1).indices.sort(-1).values
        self.top = F.pad(best, (0, 1), value=self.keys.shape[2] - 1)


_QUERIES = ("statistics", "samples", "projection", "rotation")
STEPS = {
    "published": (*_QUERIES, "masses", "votes", "kept", "storage"),
    "values": (*_QUERIES, "values_given", "kept", "storage"),
    "values, refitted": (*_QUERIES, "values_and_sinks", "kept", "refit", "storage"),
}


@dataclass(frozen=True)
class Row:
    """One method at one budget, batch size and prompt length; milliseconds per layer, MiB.

    What stands beside the published method has no value for the others.
    """

    method: str
    budget: int
    batch: int
    tokens: int
    eager: float
    selection: float
    launches: int | None
    steps: dict[str, float]
    extra_memory: float
    topk: float | None
    materialized: float | None
    materialized_memory: float | None
    floor_products: float
    floor_bytes: float


def measure(
    shapes: Shapes,
    methods: Sequence[str],
    batch: int,
    tokens: int,
    device: torch.device,
    repeats: int,
    rates: tuple[float, float],
    backend: str,
) -> list[Row]:
    """Times of a number of layers with weights and prompts of their own, one after another; a row for each method."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = [Layer(shapes, batch, tokens, device, dtype, backend)]
    if device.type == "cuda":
        count = min(max(COLD_BYTES // layers[0].bytes, 1), 9)
        layers += [Layer(shapes, batch, tokens, device, dtype, backend) for _ in range(count)]
    return [_measure_method(layers, method, repeats, rates) for method in methods]


def _measure_method(layers: list[Layer], method: str, repeats: int, rates: tuple[float, float]) -> Row:
    first = layers[0]
    shapes, device, (batch, tokens) = first.shapes, first.states.device, first.states.shape[:2]

    def time_of(name: str, *arguments: Any, graph: bool = True) -> float:
        calls: list[Callable[[], Any]] = [partial(getattr(layer, name), *arguments) for layer in layers]
        return milliseconds(calls, device, graph=graph, repeats=repeats)

    eager = time_of("select", method, graph=False)
    selection = time_of("select", method)
    steps = {step: time_of(step) for step in STEPS[method]}
    is_published = method == "published"
    topk = time_of("topk") if is_published else None
    for layer in layers:
        layer.forget()
    memory = extra_mebibytes(lambda: first.select(method), device)
    materialized = materialized_memory = None
    if is_published and batch * tokens <= 65536:
        first.forget()
        for layer in layers:
            layer.select(method)
        materialized = time_of("select_materialized")
        materialized_memory = extra_mebibytes(first.select_materialized, device)
    products = 4 * batch * shapes.heads * (shapes.proxies + 1) * tokens * shapes.head_dim
    if "refit" in STEPS[method]:
        products += 4 * batch * shapes.heads * shapes.refitted_to * tokens * shapes.head_dim
    products += 2 * batch * (shapes.proxies + 1) * shapes.hidden * shapes.heads * shapes.head_dim
    return Row(
        method,
        shapes.budget,
        batch,
        tokens,
        eager,
        selection,
        launches(lambda: first.select(method), device),
        steps,
        memory,
        topk,
        materialized,
        materialized_memory,
        1e3 * products / rates[0],
        1e3 * first.bytes / rates[1],
    )


def table(rows: Sequence[Row]) -> str:
    """One line a row: milliseconds of the whole selection and of what stands beside it; MiB."""
    header = ["method", "budget", "batch", "tokens", "eager", "graph", "launches", "extra MiB", "topk"]
    header += ["full attention", "its MiB", "floor: products", "floor: bytes"]
    cells: list[list[str]] = [
        [
            *(row.method, str(row.budget), str(row.batch), str(row.tokens), f"{row.eager:.3f}", f"{row.selection:.3f}"),
            *(_shown(row.launches, "d"), f"{row.extra_memory:.1f}", _shown(row.topk, ".4f")),
            *(_shown(row.materialized, ".3f"), _shown(row.materialized_memory, ".0f")),
            *(f"{row.floor_products:.3f}", f"{row.floor_bytes:.3f}"),
        ]
        for row in rows
    ]
    return report.table(header, cells, left=["method"])


def steps_table(rows: Sequence[Row]) -> str:
    """One line a row: milliseconds of each step; a dash where a method has no such step."""
    names = list(dict.fromkeys(step for row in rows for step in row.steps))
    cells: list[list[str]] = [
        [
            *(row.method, str(row.budget), str(row.batch), str(row.tokens)),
            *(_shown(row.steps.get(name), ".4f") for name in names),
        ]
        for row in rows
    ]
    return report.table(["method", "budget", "batch", "tokens", *names], cells, left=["method"])


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
