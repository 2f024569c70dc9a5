"""Assisted decoding: the first pass holds the prompt and candidates that may be taken back."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

import models
from mmshiftkv import ShiftKVCache

from .bench import Bench, Prompts, Settings, TextModel, draw_budget, draw_score, tokens_kept
from .case import Case, Draws, Outcome, refused
from .checks import (
    check_kept,
    check_lengths,
    compare_generations,
    compare_kept,
    full_cache,
    generate,
    kept_by_layer,
    prefilled,
)


@dataclass(frozen=True)
class Assisted(Case):
    """Candidates change no token where the budget covers the prompt, and the selection is that of the prompt alone.

    Attributes:
        assistant: seed of the assistant's weights, which the model may share; None: candidates are looked up in the
            prompt.
        candidates: in each pass, at most.
        new_tokens: generated, at most.
        room: `max_new_tokens` of the cache.
        second: a second assisted turn follows, which is refused.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    assistant: int | None
    candidates: int
    new_tokens: int
    room: int | None
    second: bool
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model = TextModel.draw(draws, sliding=0.0)
        width = draws.randint(2, 70)
        prompts = Prompts((width,), draws.randrange(2**31), draws.one_of(None, 3, 10))
        budget = draw_budget(draws, width, covering=draws.is_rare(0.6))
        room = draws.one_of(None, draws.randint(1, 30))
        return cls(
            model,
            prompts,
            budget,
            draws.one_of(None, 0, 1),
            draws.one_of(draws.randint(1, 8), draws.randint(1, 40)),
            draws.randint(2, 24),
            room,
            draws.is_rare(0.1),
            draw_score(draws),
        )

    def run(self, bench: Bench) -> Outcome:
        model, inputs, width = bench.text(self.model), self.prompts.inputs(bench.device), self.prompts.width
        cache = ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))
        options = {"max_new_tokens": self.new_tokens, "eos_token_id": None}
        found = generate(model, inputs, cache, **options, **self._help(bench))
        assert found.sequences.shape == (1, width + self.new_tokens)
        check_kept(cache, inputs["attention_mask"], self.budget)
        seen = int(cache.get_seq_length())
        assert width <= seen < found.sequences.shape[1]
        check_lengths(cache, seen, tokens_kept(self.budget, width) + seen - width)
        if tokens_kept(self.budget, width) == width:
            expected = generate(model, inputs, full_cache(model), **options)
            outcome = compare_generations(found, expected, width)
        else:
            alone = prefilled(model, ShiftKVCache(model, budget=self.budget, **dict(self.score)), inputs)
            outcome = compare_kept(kept_by_layer(cache), kept_by_layer(alone))
        if self.second:
            self._refuses_a_second_turn(bench, model, cache, found.sequences)
            return Outcome.REFUSED
        return outcome

    def _help(self, bench: Bench) -> dict[str, Any]:
        if self.assistant is None:
            return {"prompt_lookup_num_tokens": self.candidates}
        changes = {**vars(self.model), "weights": self.assistant}
        assistant = bench.text(TextModel(**changes))
        assistant.generation_config.num_assistant_tokens = self.candidates
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        return {"assistant_model": assistant}

    def _refuses_a_second_turn(
        self, bench: Bench, model: PreTrainedModel, cache: ShiftKVCache, ids: torch.Tensor
    ) -> None:
        conversation = torch.cat([ids, models.prompt_ids(1, 5).to(ids.device)], dim=1)
        inputs = {"input_ids": conversation, "attention_mask": torch.ones_like(conversation)}
        with refused(r"reset\(\)"):
            generate(model, inputs, cache, max_new_tokens=4, eos_token_id=None, **self._help(bench))
