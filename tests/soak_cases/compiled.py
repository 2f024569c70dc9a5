"""Compiled decoding against eager decoding on storage that grows."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import models
from compiling import compiling, graphs
from mmshiftkv import ShiftKVCache, decode_ahead

from .bench import Bench, Settings, TextModel, draw_score
from .case import Case, Draws, Outcome
from .checks import assert_close, check_kept, compare_generations, generate

# Few, since each is compiled anew.
_NAMES = ("llama", "qwen2", "qwen3", "gemma", "llama-mqa")


@dataclass(frozen=True)
class Compiled(Case):
    """One graph serves prompts of all lengths, and gives what eager decoding gives.

    Attributes:
        lengths: of the rows of each prompt, one after another on one model.
        budget: tokens.
        room: `max_new_tokens` of the cache.
        choice: keywords of `generate`.
        ahead: with `decode_ahead`.
        same_cache: one cache that is reset between the prompts; else a new one for each.
        turn: tokens of a second turn behind each answer; 0: there is none.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    lengths: tuple[tuple[int, ...], ...]
    budget: int
    room: int
    new_tokens: int
    choice: tuple[tuple[str, Any], ...]
    ahead: bool
    same_cache: bool
    turn: int
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model = TextModel(draws.choice(_NAMES), attention=draws.one_of("sdpa", "eager"), weights=draws.randrange(2))
        rows, new_tokens = draws.randint(1, 3), draws.randint(3, 9)
        lengths = tuple(tuple(draws.randint(1, 60) for _ in range(rows)) for _ in range(draws.randint(2, 3)))
        turn = draws.one_of(0, 0, draws.randint(1, 6))
        room = new_tokens + draws.one_of(0, draws.randint(1, 30))
        if draws.is_rare(0.2):
            room = draws.randint(1, new_tokens)
        choice = draws.one_of((), (("do_sample", True), ("top_k", 20)), (("repetition_penalty", 1.2),))
        ahead, same_cache = draws.is_rare(0.4), draws.is_rare(0.4)
        budget = draws.randint(1, 30)
        return cls(model, lengths, budget, room, new_tokens, choice, ahead, same_cache, turn, draw_score(draws))

    def run(self, bench: Bench) -> Outcome:
        torch._dynamo.reset()
        counters.clear()
        model, outcome = bench.text(self.model), Outcome.PASSED
        cache = self._cache(model)
        try:
            for seed, lengths in enumerate(self.lengths):
                outcome |= self._answer(bench, model, cache, list(lengths), seed)
                if self.same_cache:
                    cache.reset()
                else:
                    cache = self._cache(model)
            self._check_graphs()
        finally:
            torch._dynamo.reset()
        return outcome

    def _cache(self, model: PreTrainedModel) -> ShiftKVCache:
        return ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))

    def _answer(
        self, bench: Bench, model: PreTrainedModel, cache: ShiftKVCache, lengths: list[int], seed: int
    ) -> Outcome:
        inputs = {name: part.to(bench.device) for name, part in models.left_padded(lengths, seed=seed).items()}
        growing, width = ShiftKVCache(model, budget=self.budget, **dict(self.score)), max(lengths)
        found, expected = self._both(bench, model, inputs, cache, growing)
        check_kept(cache, inputs["attention_mask"], self.budget)
        outcome = compare_generations(found, expected, width)
        if not self.turn or not found.sequences.equal(expected.sequences):
            return outcome
        more = models.prompt_ids(len(lengths), self.turn, seed=seed).to(bench.device)
        conversation = torch.cat([found.sequences, more], dim=1)
        added = conversation.shape[1] - width
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(conversation[:, :added])], dim=1)
        inputs = {"input_ids": conversation, "attention_mask": mask}
        found, expected = self._both(bench, model, inputs, cache, growing)
        return outcome | compare_generations(found, expected, conversation.shape[1])

    def _both(
        self, bench: Bench, model: PreTrainedModel, inputs: Any, cache: ShiftKVCache, growing: ShiftKVCache
    ) -> tuple[Any, Any]:
        options = {"max_new_tokens": self.new_tokens, "eos_token_id": None, **dict(self.choice)}
        # On a GPU None means: as `generate` does it, or `decode_ahead`.
        own: dict[str, Any] = {"compile_config": None if bench.device.type == "cuda" else compiling()}
        if self.ahead:
            own["custom_generate"] = decode_ahead
        found = generate(model, inputs, cache, **options, **own)
        expected = generate(model, inputs, growing, **options)
        assert_close(found.logits[0], expected.logits[0], "the first logits")
        return found, expected

    def _check_graphs(self) -> None:
        """One graph; a second one, for any number of slots, once storage has moved."""
        needed = self.new_tokens - 1 + (self.turn + self.new_tokens if self.turn else 0)
        allowed = 1 if needed <= self.room else 3
        assert 1 <= graphs() <= allowed, f"{graphs()} graphs were compiled"
