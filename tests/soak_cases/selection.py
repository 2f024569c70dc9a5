"""The selection as a function, and its kernels, against float64."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

import method
import models
from mmshiftkv import ShiftKVConfig, select_tokens
from problems import Problem, allowed_errors, exact_attention, exact_group_mass, relative_error
from shiftkv_kernels import (
    MOST_ROWS,
    attend,
    gather,
    group_mass,
    keep_best,
    project_token,
    reference,
    refit_values,
    token_statistics,
    value_scores,
    vote,
)
from shiftkv_kernels.device import is_interpreted
from shiftkv_kernels.reference.values import SINK_SCORE
from test_shiftkv import assert_agrees
from test_value_scores import exact_scores

from .bench import Bench, draw_score
from .case import Case, Draws, Outcome


def can_run_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels run there: on a GPU, or under Triton's interpreter, which multiplies no bfloat16."""
    return device.type == "cuda" or (is_interpreted() and dtype != torch.bfloat16)


@dataclass(frozen=True)
class SelectTokens(Case):
    """`select_tokens` keeps what the float64 statement of the method keeps, up to scores that tie within rounding.

    Attributes:
        problem: shapes; its groups are those that vote.
        budget, mass: as the function's.
        spread: of the queries; the larger, the fewer tokens have any weight.
        dtype: of queries and keys.
        backend: "torch" or "triton".
        weight: of the last query, if values are counted; None: groups vote.
    """

    problem: Problem
    budget: int
    mass: float
    spread: float
    dtype: str
    backend: str
    weight: float | None

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        kv_heads, groups, tokens = draws.one_of(1, 2, 4), draws.one_of(1, 2, 4, 5), draws.randint(1, 130)
        problem = Problem(
            draws.randint(1, 3),
            kv_heads * draws.one_of(1, 2, 3, 7),
            kv_heads,
            groups * draws.randint(1, 6),
            groups,
            draws.one_of(8, 16, 40, 64, 80),
            tokens,
            draws.randint(0, tokens - 1),
        )
        mass = draws.one_of(0.95, 0.5, 1.0, round(draws.uniform(0.05, 1), 3))
        dtype = draws.one_of("float32", "float32", "bfloat16", "float16")
        return cls(
            problem,
            draws.randint(1, tokens + 5),
            mass,
            draws.one_of(0.5, 2.0, 6.0),
            dtype,
            draws.one_of("torch", "triton"),
            draws.one_of(None, 0.0, 1.0, 4.0),
        )

    def run(self, bench: Bench) -> Outcome:
        problem, dtype = self.problem, getattr(torch, self.dtype)
        tensors = problem.tensors(bench.device, dtype, self.spread)
        valid = problem.valid(bench.device)
        use_triton = self.backend == "triton" and can_run_triton(bench.device, dtype)
        arguments: dict[str, Any] = {"budget": self.budget, "num_groups": problem.groups, "mass": self.mass}
        values = None
        if self.weight is not None:
            values, arguments = problem.values(bench.device, dtype), {"budget": self.budget}
            arguments["last_query_weight"] = self.weight
        backend = "triton" if use_triton else "torch"
        kept = select_tokens(*tensors, values=values, valid=valid, backend=backend, **arguments)
        assert kept.shape == (problem.batch, problem.kv_heads, min(self.budget, problem.tokens))
        assert kept.dtype == torch.int64
        everything = torch.ones(problem.batch, problem.tokens, dtype=torch.bool)
        method.assert_selects(
            kept.cpu().numpy(),
            *(part.float().cpu().numpy() for part in tensors),
            valid=(everything if valid is None else valid.cpu()).numpy(),
            scaling=problem.head_dim**-0.5,
            values=None if values is None else values.float().cpu().numpy(),
            **arguments,
        )
        return Outcome.PASSED


@dataclass(frozen=True)
class Kernels(Case):
    """The Triton kernels give what plain torch and float64 give.

    On a GPU prompts are 64 times as long, which Triton's interpreter would take too long for.

    Attributes:
        problem: shapes.
        spread: of the queries.
        dtype: of queries and keys.
        count: tokens kept.
        threshold: sixteenths of a group's mass.
        slots: of the storage behind the kept tokens.
    """

    problem: Problem
    spread: float
    dtype: str
    count: int
    threshold: int
    slots: int

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        kv_heads, groups, tokens = draws.one_of(1, 2), draws.one_of(1, 2, 3), draws.randint(1, 40)
        problem = Problem(
            draws.randint(1, 2),
            kv_heads * draws.one_of(1, 2, 3),
            kv_heads,
            groups * draws.randint(1, 8),
            groups,
            draws.one_of(16, 40, 64),
            tokens,
            draws.randint(0, tokens - 1),
        )
        dtype = draws.one_of("float32", "float16", "bfloat16")
        spread = draws.one_of(0.5, 2.0, 6.0)
        return cls(problem, spread, dtype, draws.randint(1, tokens), draws.randint(1, 16), draws.randint(0, 9))

    def run(self, bench: Bench) -> Outcome:
        dtype = getattr(torch, self.dtype)
        if not can_run_triton(bench.device, dtype):
            return Outcome.PASSED  # there is nothing to compare with
        times = 64 if bench.device.type == "cuda" else 1
        problem = replace(self.problem, tokens=times * self.problem.tokens, padding=times * self.problem.padding)
        tensors = problem.tensors(bench.device, dtype, self.spread)
        self._check_mass(problem, tensors, bench.device)
        self._check_votes(problem, bench.device)
        self._check_choice(problem, tensors[2], times * self.count)
        self._check_token(tensors[2])
        self._check_values(problem, tensors, times * self.count)
        return Outcome.PASSED

    def _check_mass(self, problem: Problem, tensors: list[torch.Tensor], device: torch.device) -> None:
        keywords = problem.keywords(device)
        exact = exact_group_mass(*tensors, **keywords)
        found = group_mass(*tensors, **keywords, backend="triton")
        names = ("mass of the groups", "mass of the last query")
        for name, mine, wanted, allowed in zip(names, found, exact, allowed_errors(*tensors, **keywords), strict=True):
            error = relative_error(mine, wanted)
            assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"

    def _check_votes(self, problem: Problem, device: torch.device) -> None:
        # Sums of so few eighths are exact, so that nothing is left to rounding.
        shape = (problem.batch, problem.kv_heads, problem.groups, problem.tokens)
        generator = torch.Generator().manual_seed(self.threshold)
        mass = (torch.randint(0, 9, shape, generator=generator) / 8).to(device)
        found, expected = (vote(mass, self.threshold / 16, backend=backend) for backend in ("triton", "torch"))
        assert found.equal(expected), "votes"

    def _check_choice(self, problem: Problem, keys: torch.Tensor, count: int) -> None:
        scores = torch.rand(keys.shape[:3], generator=torch.Generator().manual_seed(self.count)).to(keys.device)
        scores = (scores * 9).round() if self.count % 2 else scores  # with equal ones
        valid = problem.valid(keys.device)
        kept = keep_best(scores, count, valid, backend="triton")
        assert kept.equal(reference.keep_best(scores, count, valid)), "the kept columns"
        room = [keys.new_full((*keys.shape[:2], count + self.slots, keys.shape[3]), torch.nan) for _ in range(4)]
        found = gather(keys, -keys, kept, out=(room[0], room[1]), backend="triton")
        expected = gather(keys, -keys, kept, out=(room[2], room[3]), backend="torch")
        assert all(mine.equal(theirs) for mine, theirs in zip(found, expected, strict=True)), "the kept keys and values"

    def _check_values(self, problem: Problem, tensors: list[torch.Tensor], count: int) -> None:
        """Scores are those of float64, and refitted values those of plain torch, up to rounding."""
        queries, last, keys = tensors
        keywords: dict[str, Any] = {"scaling": problem.head_dim**-0.5, "valid": problem.valid(keys.device)}
        values, kept = problem.values(keys.device, keys.dtype), problem.kept(count, keys.device)
        norms = queries.float().norm(dim=-1).max() * keys.float().norm(dim=-1).max() * keywords["scaling"]
        rounding = 2**-23 * max(norms.item(), 1.0)
        exact = exact_scores(*tensors, values, **keywords, last_weight=1.0)
        # Attention sinks have scores of their own above all others.
        found = [value_scores(*tensors, values, **keywords, backend=backend) for backend in ("triton", "torch")]
        assert (found[0] >= SINK_SCORE).equal(found[1] >= SINK_SCORE), "attention sinks"
        others = (exact < SINK_SCORE) & (found[0] < SINK_SCORE)
        exact = exact.where(others, 0)
        error, own = ((scores.where(others, 0) - exact).norm() for scores in found)
        # A token with nearly all of the mass is divided by what is left, and lies next to the mean output.
        left = min((1 - exact_attention(rows, keys, **keywords).mean((2, 3))).min().item() for rows in (queries, last))
        allowed = 2 * own + 8 * rounding / max(left, 1e-3) * (exact.norm() + values.double().norm())
        assert error <= allowed, f"scores: error {error:.3g}, allowed {allowed:.3g}"
        outputs = attend(queries, keys, values, **keywords, backend="torch")
        keywords |= {"ridge": 3.0, "steps": 2}
        found, expected = (
            refit_values(queries, outputs, keys, values, kept, **keywords, backend=backend)
            for backend in ("triton", "torch")
        )
        error, allowed = relative_error(found, expected.double()), 400 * rounding + torch.finfo(keys.dtype).eps
        assert error <= allowed, f"refitted values: relative error {error:.3g}, allowed {allowed:.3g}"

    def _check_token(self, keys: torch.Tensor) -> None:
        states = keys.flatten(1, 2)
        for mine, theirs in zip(
            token_statistics(states, backend="triton"), reference.token_statistics(states), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
        self._check_projections(states)

    def _check_projections(self, states: torch.Tensor) -> None:
        """Of the states of one row or of several, as many as there are up to the most that are taken."""
        weights, biases = [states[0].contiguous(), states[-1, :1].contiguous()], [None, states[0, :1, 0].contiguous()]
        doubled = [part.double() for part in weights], [None, states[0, :1, 0].double()]
        for rows in (1, min(self.count + 1, MOST_ROWS)):
            state = states[0, :rows].contiguous()
            found = project_token(state, weights, biases, backend="triton")
            exact = reference.project_token(state.double(), *doubled)
            sizes = state.double().norm(dim=-1, keepdim=True)
            for mine, wanted, weight in zip(found, exact, weights, strict=True):
                error = ((mine.double() - wanted).abs() / (sizes * weight.double().norm(dim=-1).max() + 1)).max()
                allowed = 4 * torch.finfo(mine.dtype).eps
                assert error <= allowed, f"projections of {rows} rows: relative error {error.item():.3g}"


@dataclass(frozen=True)
class WholeSelection(Case):
    """A cache keeps and stores what the float64 statement of all steps says, from hidden states on; always on a CPU.

    Attributes:
        name, kv_heads: of the decoder.
        lengths: of the prompts.
        settings: of ShiftKV.
    """

    name: str
    kv_heads: int
    lengths: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        groups = draws.one_of(1, 2, 4)
        settings = {
            "budget": draws.randint(1, 40),
            "num_groups": groups,
            "num_proxies": groups * draws.randint(1, 10),
            "gamma": draws.one_of(10.0, 1.0, 0.0, 3.0),
            "mass": draws.one_of(0.95, 0.5, 0.8),
            "seed": draws.randrange(2**32),
            "stats_window": draws.one_of(None, draws.randint(2, 30)),
            "future_stride": draws.one_of(None, draws.randint(1, 9)),
            "last_token_layers": draws.one_of(0, 0, 1, 3),
        }
        name = draws.one_of("llama", "qwen2", "qwen3")
        lengths = tuple(draws.randint(2, 60) for _ in range(draws.randint(1, 3)))
        kv_heads = draws.one_of(1, 2, 4)
        return cls(name, kv_heads, lengths, (*settings.items(), *draw_score(draws)))

    def run(self, bench: Bench) -> Outcome:
        model = models.text_model(self.name, num_key_value_heads=self.kv_heads)
        rotary = model.model.rotary_emb
        axis_of = np.zeros(rotary.inv_freq.shape[0], int)
        config = ShiftKVConfig(**dict(self.settings))
        assert_agrees(model, rotary, models.left_padded(list(self.lengths)), config, axis_of)
        return Outcome.PASSED
