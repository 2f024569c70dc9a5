"""Exceptions and interrupts in the middle of a pass."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

import models
from mmshiftkv import ShiftKVCache

from .bench import Bench, Prompts, Settings, TextModel, draw_budget, draw_score
from .case import Case, Draws, Outcome, Planted, PlantedInterrupt, refused
from .checks import run_pass
from .chunks import chunked_settings
from .copies import assert_same_state, state_of

_PLACES = ("self_attn", "mlp", "self_attn.q_proj", "self_attn.o_proj")


@contextlib.contextmanager
def planted(model: PreTrainedModel, layer: int, place: str, before: bool, error: type[BaseException]) -> Iterator[None]:
    """A module of a layer raises when it runs next; with `before`, as it begins."""
    module = model.get_decoder().layers[layer].get_submodule(place)

    def fail(*_: Any) -> None:
        raise error("planted")

    handle = module.register_forward_pre_hook(fail) if before else module.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Interrupts(Case):
    """What is raised in a pass goes through, leaves no hooks, and a cache is as new after `reset()`.

    Attributes:
        sizes: tokens of the passes: those of the prompt, then those behind it.
        prompt_passes: how many of them hold the prompt.
        failing: the number of the pass that fails.
        layer, place, before: where.
        interrupt: it is a Ctrl-C, which runs no hook; else an exception.
        room: `max_new_tokens` of the cache.
        goes_on: the cache is used once more before it is reset.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    sizes: tuple[int, ...]
    prompt_passes: int
    failing: int
    layer: int
    place: str
    before: bool
    interrupt: bool
    room: int | None
    goes_on: bool
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts = TextModel.draw(draws), Prompts.draw(draws, shortest=5)
        sizes = [prompts.width]
        if draws.is_rare(0.5):
            first, second = sorted(draws.sample(range(1, prompts.width), 2))
            sizes = [first, second - first, prompts.width - second]
        passes = len(sizes)
        sizes += [1] * draws.randint(1, 3)
        return cls(
            model,
            prompts,
            draw_budget(draws, prompts.width, covering=draws.is_rare(0.2)),
            tuple(sizes),
            passes,
            draws.randrange(len(sizes)) if draws.is_rare(0.3) else draws.randrange(passes),
            draws.randrange(3),
            draws.choice(_PLACES),
            draws.is_rare(0.5),
            draws.is_rare(0.5),
            draws.one_of(None, None, 8),
            draws.is_rare(0.5),
            draw_score(draws),
        )

    def run(self, bench: Bench) -> Outcome:
        model = bench.text(self.model)
        expected, whole = self._cache(model), []
        for number in range(len(self.sizes)):
            whole.append(self._pass(model, expected, number))
        cache = self._cache(model)
        for number in range(self.failing):
            self._pass(model, cache, number)
        outcome = self._fail(model, cache)
        cache.reset()
        assert models.hooks_on(model) == 0, "hooks are left after reset()"
        assert int(cache.get_seq_length()) == 0
        assert all(cache.kept_indices(index) is None for index in range(len(cache.layers)))
        for another in (cache, self._cache(model)):
            found = [self._pass(model, another, number) for number in range(len(self.sizes))]
            assert all(mine.equal(theirs) for mine, theirs in zip(found, whole, strict=True)), (
                "other logits than before"
            )
            assert_same_state(state_of(another), state_of(expected), "the cache after a failure")
        return outcome

    def _cache(self, model: PreTrainedModel) -> ShiftKVCache:
        own = chunked_settings("single" if self.prompt_passes == 1 else "told", self.prompts.width, self.room)
        return ShiftKVCache(model, budget=self.budget, **own, **dict(self.score))

    def _pass(self, model: PreTrainedModel, cache: Any, number: int) -> torch.Tensor:
        inputs = self.prompts.inputs(model.device)
        later = sum(self.sizes) - self.prompts.width
        tokens = models.prompt_ids(len(self.prompts.lengths), later, seed=1).to(model.device)
        ids = torch.cat([inputs["input_ids"], tokens], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
        start, end = sum(self.sizes[:number]), sum(self.sizes[: number + 1])
        return run_pass(model, cache, ids[:, start:end], mask[:, :end])

    def _fail(self, model: PreTrainedModel, cache: Any) -> Outcome:
        error = PlantedInterrupt if self.interrupt else Planted
        was_raised = False
        with planted(model, self.layer, self.place, self.before, error):
            try:
                self._pass(model, cache, self.failing)
            except error:
                was_raised = True
        assert was_raised, "the planted exception did not come through"
        in_prompt = self.failing < self.prompt_passes
        if not self.interrupt:
            assert models.hooks_on(model) == 0, "hooks are left after an exception"
            if in_prompt:
                assert int(cache.get_seq_length()) == 0, "the cache is not empty after a prefill that failed"
        if in_prompt and self.interrupt and self.goes_on and self._is_partial():
            with refused(r"interrupted; call reset\(\)"):
                self._pass(model, cache, self.failing)
            return Outcome.REFUSED
        return Outcome.PASSED

    def _is_partial(self) -> bool:
        """Whether some compressed layers had been given their tokens before the interrupt, and some had not."""
        if self.model.sliding:
            return False  # which layers are compressed depends on the model
        is_past_update = not self.before if self.place == "self_attn" else self.place in ("mlp", "self_attn.o_proj")
        return 0 < self.layer + is_past_update < 3
