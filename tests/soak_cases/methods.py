"""The other methods by the same checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mmshiftkv import METHODS, make_cache
from mmshiftkv.registry import CACHES

from .bench import Bench, Prompts, TextModel, draw_budget, tokens_kept
from .case import Case, Draws, Outcome, refused
from .checks import (
    check_kept,
    check_lengths,
    compare_generations,
    compare_kept,
    generate,
    kept_by_layer,
    masked_generation,
    prefilled,
)

NAMES = tuple(name for name in METHODS if name not in ("full", "shiftkv"))
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "random": ({}, {"seed": 3}),
    "streaming_llm": ({}, {"sinks": 1}, {"sinks": 9}),
    "expected_attention": ({}, {"sinks": 1, "future_positions": 20}, {"epsilon": 0.01}),
    "snapkv": ({}, {"window": 5}, {"window": 1, "kernel_size": 1}),
    "keydiff": ({},),
}


def draw_method(draws: Draws) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The name of a method that is not ShiftKV, and settings of it."""
    method = draws.choice(NAMES)
    return method, tuple(draws.choice(SETTINGS[method]).items())


def protected(method: str, settings: Mapping[str, Any]) -> int:
    """How many tokens a method always keeps; an int budget may not be less."""
    return CACHES[method].method_type(**settings).protected


@dataclass(frozen=True)
class OtherMethod(Case):
    """Every method keeps its budget, a row as alone and chunks as a single pass, and goes on as the masked full cache.

    Attributes:
        method: the name of the cache's method.
        settings: of the method.
        choice: keywords of `generate`.
        chunk: tokens of a chunk; None: one pass.
        room: `max_new_tokens` of the cache.
    """

    model: TextModel
    prompts: Prompts
    method: str
    settings: tuple[tuple[str, Any], ...]
    budget: int | float
    choice: tuple[tuple[str, Any], ...]
    new_tokens: int
    chunk: int | None
    room: int | None

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts = TextModel.draw(draws), Prompts.draw(draws, shortest=2)
        method, settings = draw_method(draws)
        choice = draws.one_of((), (("num_beams", 3),), (("do_sample", True), ("num_return_sequences", 2)))
        chunk = draws.one_of(None, None, draws.randint(1, prompts.width))
        room = draws.one_of(None, draws.randint(1, 10))
        budget = draw_budget(draws, prompts.width, covering=draws.is_rare(0.1))
        return cls(model, prompts, method, settings, budget, choice, draws.randint(1, 8), chunk, room)

    def run(self, bench: Bench) -> Outcome:
        model, inputs, settings = bench.text(self.model), self.prompts.inputs(bench.device), dict(self.settings)
        own: dict[str, Any] = {"max_new_tokens": self.room}
        if isinstance(self.budget, int) and self.budget < protected(self.method, settings):
            with refused("always keeps so many tokens"):
                make_cache(self.method, model, self.budget, **settings, **own)
            return Outcome.REFUSED
        cache = make_cache(self.method, model, self.budget, **settings, **own)
        options = {"max_new_tokens": self.new_tokens, **dict(self.choice)}
        chunks = {"prefill_chunk_size": self.chunk} if self.chunk else {}
        found = generate(model, inputs, cache, **options, **chunks)
        single = prefilled(model, make_cache(self.method, model, self.budget, **settings), inputs)
        rows = cache.layers[0].keys.shape[0] // len(self.prompts.lengths)
        check_kept(cache, inputs["attention_mask"].repeat_interleave(rows, dim=0), self.budget)
        seen, width = int(cache.get_seq_length()), self.prompts.width
        check_lengths(cache, seen, tokens_kept(self.budget, width) + seen - width)
        single.batch_repeat_interleave(rows)
        outcome = compare_kept(kept_by_layer(cache), kept_by_layer(single))
        expected = masked_generation(model, inputs, kept_by_layer(cache), **options)
        return outcome | compare_generations(found, expected, width)
