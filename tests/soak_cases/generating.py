"""Ways to generate: small budgets against the masked full cache, covering budgets against the full cache itself."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from mmshiftkv import ShiftKVCache, decode_ahead

from .bench import FIRST_LETTER, Bench, Prompts, Settings, TextModel, draw_budget, draw_score, letters, tokens_kept
from .case import Case, Draws, Outcome
from .checks import (
    check_kept,
    check_lengths,
    compare_generations,
    full_cache,
    generate,
    kept_by_layer,
    masked_generation,
)

CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "sequences": {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "beam sequences": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True, "top_k": 20},
}
CHANGES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "ngrams": {"no_repeat_ngram_size": 2},
    "minimum": {"min_new_tokens": 6},
    "suppressed": {"suppress_tokens": [5, 6, 7]},
    "ends": {"eos_token_id": [2, 10, 20, 30, 40, 50, 60, 70, 80, 90]},
    "never ends": {"eos_token_id": None},
    "forced end": {"forced_eos_token_id": 2},
    "strings": {"stop_strings": [chr(FIRST_LETTER + index) for index in range(0, 125, 9)]},
    "processor": {},
}


class Shift(LogitsProcessor):
    """A processor of the user's own: prefers tokens by their number and the length so far."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        numbers = torch.arange(scores.shape[-1], device=scores.device)
        return scores + ((numbers + input_ids.shape[1]) % 5).to(scores.dtype)


class Collected(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then each token."""
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Hears that nothing more comes."""
        self.has_ended = True


@dataclass(frozen=True)
class Generation:
    """How `generate` is asked to go on.

    Attributes:
        choice: of `CHOICES`, how tokens are chosen.
        changes: of `CHANGES`, what is done to the logits, and when it ends.
        new_tokens: the most.
        seed: of the sampling.
    """

    choice: str
    changes: tuple[str, ...]
    new_tokens: int
    seed: int

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        """A choice of tokens with up to two changes."""
        choice = draws.choice(list(CHOICES))
        return cls(choice, draws.some_of(list(CHANGES), 2), draws.randint(1, 14), draws.randrange(2**31))

    @property
    def rows_each(self) -> int:
        """Rows of the cache for one row of the prompt."""
        choice = CHOICES[self.choice]
        return max(choice.get("num_beams", 1), choice.get("num_return_sequences", 1))

    @property
    def has_beams(self) -> bool:
        """Whether it is a beam search."""
        return "num_beams" in CHOICES[self.choice]

    def options(self) -> dict[str, Any]:
        """Keywords of `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.new_tokens, "seed": self.seed, **CHOICES[self.choice]}
        for name in self.changes:
            options |= CHANGES[name]
        if "strings" in self.changes:
            # As a criterion: `generate` hands the tokenizer that `stop_strings` needs to no loop but its own.
            criterion = StopStringCriteria(letters(), options.pop("stop_strings"))
            options["stopping_criteria"] = StoppingCriteriaList([criterion])
        if "processor" in self.changes:
            options["logits_processor"] = LogitsProcessorList([Shift()])
        if "min_new_tokens" in options:
            options["min_new_tokens"] = min(options["min_new_tokens"], self.new_tokens)
        return options


@dataclass(frozen=True)
class SmallBudget(Case):
    """Any way to generate, with any budget, gives what the masked full cache gives.

    Attributes:
        room: `max_new_tokens` of the cache.
        ahead: with `decode_ahead`.
        streams: a streamer is given.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    generation: Generation
    room: int | None
    ahead: bool
    streams: bool
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts, generation = TextModel.draw(draws), Prompts.draw(draws), Generation.draw(draws)
        ahead = not model.sliding and not generation.has_beams and draws.is_rare(0.3)
        room = draws.one_of(None, generation.new_tokens, generation.new_tokens + draws.randint(1, 9))
        if draws.is_rare(0.15) or (ahead and room is None):
            room = draws.randint(1, generation.new_tokens)  # what does not fit moves to larger storage
        streams = len(prompts.lengths) * generation.rows_each == 1 and draws.is_rare(0.5)
        budget, score = draw_budget(draws, prompts.width), draw_score(draws, refit=False)
        return cls(model, prompts, budget, generation, room, ahead, streams, score)

    def run(self, bench: Bench) -> Outcome:
        model, inputs = bench.text(self.model), self.prompts.inputs(bench.device)
        cache = ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))
        options, streamer = self.generation.options(), Collected()
        own = {"custom_generate": decode_ahead} if self.ahead else {}
        if self.streams:
            own["streamer"] = streamer
        found = generate(model, inputs, cache, **options, **own)
        kept = kept_by_layer(cache)
        rows = inputs["attention_mask"].repeat_interleave(self.generation.rows_each, dim=0)
        check_kept(cache, rows, self.budget)
        self._check_stored(cache, found)
        if self.streams:
            assert streamer.has_ended
            assert streamer.tokens == found.sequences[0].tolist()
        expected = masked_generation(model, inputs, kept, **options)
        return compare_generations(found, expected, self.prompts.width)

    def _check_stored(self, cache: ShiftKVCache, found: Any) -> None:
        seen = int(cache.get_seq_length())
        width = self.prompts.width
        if not self.generation.has_beams:  # beam search may return less than the longest beam
            assert seen == found.sequences.shape[1] - 1, f"{seen} tokens seen, {found.sequences.shape[1]} in all"
        check_lengths(cache, seen, tokens_kept(self.budget, width) + seen - width)


@dataclass(frozen=True)
class CoveringBudget(Case):
    """A budget that covers the prompt gives what the full cache gives, to the bit where storage grows.

    Attributes:
        room: `max_new_tokens` of the cache.
        ahead: with `decode_ahead`.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    generation: Generation
    room: int | None
    ahead: bool
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts, generation = TextModel.draw(draws), Prompts.draw(draws), Generation.draw(draws)
        ahead = not model.sliding and not generation.has_beams and draws.is_rare(0.2)
        room = draws.randint(1, 20) if ahead or draws.is_rare(0.4) else None
        budget = draw_budget(draws, prompts.width, covering=True)
        return cls(model, prompts, budget, generation, room, ahead, draw_score(draws))

    def run(self, bench: Bench) -> Outcome:
        model, inputs, options = bench.text(self.model), self.prompts.inputs(bench.device), self.generation.options()
        cache = ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))
        own = {"custom_generate": decode_ahead} if self.ahead else {}
        found = generate(model, inputs, cache, **options, **own)
        expected = generate(model, inputs, full_cache(model), **options)
        seen = int(cache.get_seq_length())
        check_lengths(cache, seen, seen)
        for kept in kept_by_layer(cache).values():
            everything = torch.arange(self.prompts.width, device=bench.device)
            assert kept is None or kept.equal(everything.expand_as(kept))
        return compare_generations(found, expected, self.prompts.width, exact=not cache.is_compileable)
