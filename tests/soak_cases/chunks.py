"""Prompts in several passes against the same prompt in one."""

from dataclasses import dataclass
from typing import Any, Self

import torch

import models
from mmshiftkv import ShiftKVCache

from .bench import Bench, Prompts, Settings, TextModel, draw_budget, draw_score, has_refit, tokens_kept
from .case import Case, Draws, Outcome, refused
from .checks import (
    assert_close,
    check_kept,
    check_lengths,
    compare_generations,
    compare_kept,
    generate,
    kept_by_layer,
    masked_generation,
    masked_logits,
    prefilled,
    run_pass,
)


def draw_settings(draws: Draws) -> Settings:
    """Settings of ShiftKV: of its score, and those that look at parts of a prompt."""
    window, layers = ("stats_window", draws.randint(1, 20)), ("last_token_layers", draws.randint(1, 3))
    return draws.one_of((), (window,), (layers,)) + draw_score(draws)


def chunked_settings(prefill: str, width: int, room: int | None) -> dict[str, Any]:
    """Settings of a cache: `prefill` is "single", or "told" or "untold" the columns of a prompt in chunks."""
    settings: dict[str, Any] = {"max_new_tokens": room}
    if prefill != "single":
        settings |= {"prefill": "chunked", "prompt_length": width if prefill == "told" else None}
    return settings


@dataclass(frozen=True)
class GeneratedInChunks(Case):
    """`generate` with `prefill_chunk_size` selects what a single pass selects, and goes on as the masked full cache.

    Where values are refitted, it goes on as after a single pass.

    Attributes:
        chunk: tokens of a chunk.
        prefill: as in `chunked_settings`; `generate` tells the cache where the prompt ends in any case.
        room: `max_new_tokens` of the cache.
        settings: of ShiftKV.
        beams: of a beam search; 1: greedy.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    chunk: int
    prefill: str
    room: int | None
    settings: Settings
    beams: int
    new_tokens: int

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts = TextModel.draw(draws), Prompts.draw(draws, shortest=2)
        width = prompts.width
        chunk = draws.one_of(draws.randint(1, width + 3), max(1, width - 1), draws.randint(1, 9))
        budget = draw_budget(draws, width, covering=draws.is_rare(0.2))
        prefill, room = draws.one_of("single", "single", "told", "untold"), draws.one_of(None, draws.randint(1, 9))
        beams = draws.one_of(1, 1, 3)
        return cls(model, prompts, budget, chunk, prefill, room, draw_settings(draws), beams, draws.randint(1, 6))

    def run(self, bench: Bench) -> Outcome:
        model, inputs, settings = bench.text(self.model), self.prompts.inputs(bench.device), dict(self.settings)
        width = self.prompts.width
        own = chunked_settings(self.prefill, width, self.room)
        cache = ShiftKVCache(model, budget=self.budget, **own, **settings)
        options = {"max_new_tokens": self.new_tokens, "num_beams": self.beams, "eos_token_id": None}
        found = generate(model, inputs, cache, prefill_chunk_size=self.chunk, **options)
        single = prefilled(model, ShiftKVCache(model, budget=self.budget, **settings), inputs)
        rows = inputs["attention_mask"].repeat_interleave(self.beams, dim=0)
        check_kept(cache, rows, self.budget)
        check_lengths(cache, width + self.new_tokens - 1, tokens_kept(self.budget, width) + self.new_tokens - 1)
        single.batch_repeat_interleave(self.beams)
        outcome = compare_kept(kept_by_layer(cache), kept_by_layer(single))
        if not has_refit(self.settings):
            expected = masked_generation(model, inputs, kept_by_layer(cache), **options)
        elif outcome is Outcome.TIED:
            return outcome  # other columns, other logits
        else:
            expected = generate(model, inputs, ShiftKVCache(model, budget=self.budget, **settings), **options)
        return outcome | compare_generations(found, expected, width)


@dataclass(frozen=True)
class FedInChunks(Case):
    """Chunks of any sizes, fed one after another, select and store what a single pass does.

    Attributes:
        sizes: tokens of each chunk.
        told: the cache is told the prompt's length; else `end_prompt()` ends it.
        room: `max_new_tokens` of the cache.
        steps: tokens of the turn behind the prompt.
        settings: of ShiftKV.
        unpadded: masks are left out, where the prompt has no padding.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    sizes: tuple[int, ...]
    told: bool
    room: int | None
    steps: int
    settings: Settings
    unpadded: bool

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts, sizes = TextModel.draw(draws), Prompts.draw(draws), []
        while sum(sizes) < prompts.width:
            size = draws.one_of(1, draws.randint(1, 5), draws.randint(1, 40))
            sizes.append(min(size, prompts.width - sum(sizes)))
        budget = draw_budget(draws, prompts.width, covering=draws.is_rare(0.2))
        unpadded = set(prompts.lengths) == {prompts.width} and draws.is_rare(0.5)
        told, steps = draws.is_rare(0.5), draws.randint(1, 6)
        room = draws.one_of(None, draws.randint(1, 9))
        return cls(model, prompts, budget, tuple(sizes), told, room, steps, draw_settings(draws), unpadded)

    def run(self, bench: Bench) -> Outcome:
        model, inputs, settings = bench.text(self.model), self.prompts.inputs(bench.device), dict(self.settings)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        own = chunked_settings("told" if self.told else "untold", self.prompts.width, self.room)
        cache = ShiftKVCache(model, budget=self.budget, **own, **settings)
        is_refused, fed = False, 0
        for size in self.sizes:
            piece, so_far = ids[:, fed : fed + size], None if self.unpadded else mask[:, : fed + size]
            if not self.told and size == 1 and fed:
                # It may be the last token of the prompt or the first of the answer.
                with refused("end_prompt|prompt_length"):
                    run_pass(model, cache, piece, so_far)
                is_refused = True
                break
            run_pass(model, cache, piece, so_far)
            fed += size
            if not self.told or fed < self.prompts.width:
                assert all(kept is None for kept in kept_by_layer(cache).values())
                check_lengths(cache, fed, fed)
        if is_refused:
            check_lengths(cache, fed, fed)
            if not mask[:, :fed].any(dim=1).all():
                return Outcome.REFUSED  # a row has nothing but padding so far, which is no prompt
        cache.end_prompt()
        outcome = self._compare(model, cache, ids[:, :fed], mask[:, :fed], settings)
        return Outcome.REFUSED if is_refused else outcome

    def _compare(
        self, model: Any, cache: ShiftKVCache, ids: torch.Tensor, mask: torch.Tensor, settings: dict[str, Any]
    ) -> Outcome:
        check_kept(cache, mask, self.budget)
        check_lengths(cache, ids.shape[1], tokens_kept(self.budget, ids.shape[1]))
        inputs = {"input_ids": ids, "attention_mask": mask}
        single = prefilled(model, ShiftKVCache(model, budget=self.budget, **settings), inputs)
        outcome = compare_kept(kept_by_layer(cache), kept_by_layer(single))
        turn = models.prompt_ids(ids.shape[0], self.steps, seed=self.steps).to(ids.device)
        whole = torch.cat([mask, mask.new_ones(turn.shape)], dim=1)
        found = run_pass(model, cache, turn, whole)
        if not has_refit(self.settings):
            expected = masked_logits(model, [ids, turn], mask, kept_by_layer(cache))[1]
        elif outcome is Outcome.TIED:
            return outcome  # other columns, other logits
        else:
            expected = run_pass(model, single, turn, whole)
        assert_close(found, expected, "logits of the turn")
        return outcome
