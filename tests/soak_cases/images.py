"""Prompts with real images."""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch

import models
from masked_reference import dropped_entries_masked
from mmshiftkv import ShiftKVCache, decode_ahead

from .bench import Bench, Settings, draw_budget, draw_score, tokens_kept
from .case import Case, Draws, Outcome
from .checks import (
    check_kept,
    check_lengths,
    compare_generations,
    full_cache,
    generate,
    kept_by_layer,
    masked_generation,
    run_pass,
)

FAMILIES = ("qwen2_5_vl", "vicuna", "mistral")
QUESTIONS = ("What is the Total?", "What are the Name and the Date?", "Read line 1.", "", "Why?")
CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"do_sample": True, "top_k": 20},
    {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2},
)
Page = tuple[str, tuple[tuple[int, int], ...]]


def draw_page(draws: Draws, most: int) -> Page:
    """A question about up to so many images, each given by its size."""
    sizes = tuple((draws.randint(56, 200), draws.randint(56, 200)) for _ in range(draws.randint(1, most)))
    return draws.choice(QUESTIONS), sizes


def inputs_of(bench: Bench, case: models.VisionCase, pages: tuple[Page, ...]) -> dict[str, torch.Tensor]:
    """A batch of these questions."""
    prompts = [(question, [models.document_image(*size) for size in sizes]) for question, sizes in pages]
    return {name: part.to(bench.device) for name, part in case.inputs(*prompts).items()}


@dataclass(frozen=True)
class Images(Case):
    """Prompts with images give what the masked full cache gives, or the full cache where the budget covers them.

    Attributes:
        family, attention: of the model.
        pages: a question and its images, for each row.
        share: of the prompt's columns that is the budget; None: all of them.
        choice: number of `CHOICES`.
        room: `max_new_tokens` of the cache.
        ahead: with `decode_ahead`.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    family: str
    attention: str
    pages: tuple[Page, ...]
    share: float | None
    choice: int
    new_tokens: int
    room: int | None
    ahead: bool
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        pages = tuple(draw_page(draws, 2) for _ in range(draws.randint(1, 2)))
        share = None if draws.is_rare(0.2) else round(draws.uniform(0.01, 0.9), 3)
        choice, ahead = draws.randrange(len(CHOICES)), draws.is_rare(0.3)
        ahead = ahead and "num_beams" not in CHOICES[choice]
        room = draws.randint(1, 12) if ahead or draws.is_rare(0.3) else None
        attention = draws.one_of("sdpa", "sdpa", "eager")
        family, new_tokens = draws.choice(FAMILIES), draws.randint(2, 7)
        score = draw_score(draws, refit=share is None)
        return cls(family, attention, pages, share, choice, new_tokens, room, ahead, score)

    def run(self, bench: Bench) -> Outcome:
        case = bench.vision(self.family, self.attention)
        model, inputs = case.model, inputs_of(bench, case, self.pages)
        mask, width = inputs["attention_mask"], inputs["input_ids"].shape[1]
        budget = width if self.share is None else self.share
        cache = ShiftKVCache(model, budget=budget, max_new_tokens=self.room, **dict(self.score))
        options = {"max_new_tokens": self.new_tokens, **CHOICES[self.choice]}
        own = {"custom_generate": decode_ahead} if self.ahead else {}
        found = generate(model, inputs, cache, **options, **own)
        rows = cache.layers[0].keys.shape[0] // len(self.pages)
        check_kept(cache, mask.repeat_interleave(rows, dim=0), budget)
        seen = int(cache.get_seq_length())
        check_lengths(cache, seen, tokens_kept(budget, width) + seen - width)
        if self.share is None:
            expected = generate(model, inputs, full_cache(model), **options)
            return compare_generations(found, expected, width, exact=not cache.is_compileable)
        return compare_generations(found, masked_generation(model, inputs, kept_by_layer(cache), **options), width)


@dataclass(frozen=True)
class Questions(Case):
    """Copies of one compressed document answer questions as copies of the masked full cache.

    Attributes:
        family, attention: of the model.
        page: the document.
        budget: tokens or share.
        questions: new ids of each question.
        room: `max_new_tokens` of the cache.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    family: str
    attention: str
    page: Page
    budget: int | float
    questions: tuple[int, ...]
    room: int | None
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        questions = tuple(draws.randint(1, 15) for _ in range(draws.randint(1, 3)))
        family, room = draws.choice(FAMILIES), draws.one_of(None, 4, 40)
        attention, budget = draws.one_of("sdpa", "eager"), draw_budget(draws, 120)
        page, score = draw_page(draws, 2), draw_score(draws, refit=False)
        return cls(family, attention, page, budget, questions, room, score)

    def run(self, bench: Bench) -> Outcome:
        case, outcome = bench.vision(self.family, self.attention), Outcome.PASSED
        model, inputs = case.model, inputs_of(bench, case, (self.page,))
        document = ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))
        full = full_cache(model)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        for cache in (document, full):
            run_pass(model, cache, ids, attention_mask=mask, **inputs)
        kept = kept_by_layer(document)
        check_kept(document, mask, self.budget)
        for seed, tokens in enumerate(self.questions):
            question = models.prompt_ids(1, tokens, seed=seed).to(bench.device)
            conversation = torch.cat([ids, question], dim=1)
            whole = {"input_ids": conversation, "attention_mask": torch.ones_like(conversation)}
            found = generate(model, whole, copy.deepcopy(document), max_new_tokens=4)
            with dropped_entries_masked(model, kept, mask.bool()):
                expected = generate(model, whole, copy.deepcopy(full), max_new_tokens=4)
            outcome |= compare_generations(found, expected, conversation.shape[1])
            check_lengths(document, ids.shape[1], tokens_kept(self.budget, ids.shape[1]))
        return outcome
