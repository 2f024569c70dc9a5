"""Several turns on one cache, with `generate` and with forward passes."""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch

import models
from mmshiftkv import ShiftKVCache, decode_ahead

from .bench import Bench, Prompts, Settings, TextModel, draw_budget, draw_score, tokens_kept
from .case import Case, Draws, Outcome
from .checks import assert_close, check_kept, check_lengths, generate, kept_by_layer, masked_logits, run_pass


@dataclass(frozen=True)
class Turns(Case):
    """Every turn of a conversation gets the logits of the masked full cache.

    Attributes:
        turns: each with its new ids and how many tokens are generated behind them.
        room: `max_new_tokens` of the cache.
        ahead: with `decode_ahead`.
        sampled: the answers are sampled.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    turns: tuple[tuple[int, int], ...]
    room: int | None
    ahead: bool
    sampled: bool
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts = TextModel.draw(draws), Prompts.draw(draws, longest=60)
        turns = ((0, draws.randint(2, 8)),)
        turns += tuple((draws.randint(1, 12), draws.randint(1, 8)) for _ in range(draws.randint(1, 3)))
        budget = draw_budget(draws, prompts.width, covering=draws.is_rare(0.2))
        ahead = draws.is_rare(0.3)
        room = draws.randint(1, 30) if ahead or draws.is_rare(0.4) else None
        sampled, score = draws.is_rare(0.3), draw_score(draws, refit=False)
        return cls(model, prompts, budget, turns, room, ahead, sampled, score)

    def run(self, bench: Bench) -> Outcome:
        model, inputs = bench.text(self.model), self.prompts.inputs(bench.device)
        cache = ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))
        ids, mask, found = inputs["input_ids"], inputs["attention_mask"], {}
        for number, (new, answer) in enumerate(self.turns):
            more = models.prompt_ids(ids.shape[0], new, seed=number).to(bench.device)
            ids = torch.cat([ids, more], dim=1)
            own = {"custom_generate": decode_ahead} if self.ahead else {}
            whole = torch.cat([mask, mask.new_ones(mask.shape[0], ids.shape[1] - mask.shape[1])], dim=1)
            output = generate(
                model,
                {"input_ids": ids, "attention_mask": whole},
                cache,
                seed=number,
                max_new_tokens=answer,
                do_sample=self.sampled,
                eos_token_id=None,
                **own,
            )
            found |= {ids.shape[1] - 1 + step: logits for step, logits in enumerate(output.logits)}
            ids = output.sequences
            check_kept(cache, mask, self.budget)
            check_lengths(cache, ids.shape[1] - 1, self._stored(ids.shape[1] - 1))
        self._compare(model, ids, mask, cache, found)
        return Outcome.PASSED

    def _stored(self, seen: int) -> int:
        return seen - self.prompts.width + tokens_kept(self.budget, self.prompts.width)

    def _compare(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: ShiftKVCache, found: dict[int, torch.Tensor]
    ) -> None:
        """All logits of the conversation, `found` by the column that they were made for, against one pass."""
        width = self.prompts.width
        expected = torch.cat(masked_logits(model, [ids[:, :width], ids[:, width:]], mask, kept_by_layer(cache)), dim=1)
        for column, logits in found.items():
            assert_close(logits, expected[:, column], f"logits behind column {column}")


@dataclass(frozen=True)
class PaddedTurns(Case):
    """Turns of different length, padded in front, get in each row the logits of the masked full cache.

    Attributes:
        turns: tokens of each row, for each turn.
        room: `max_new_tokens` of the cache.
        before: what comes between the prompt and the first turn: "step" (one token), "end_prompt", "copy" (the turns go
            to a deep copy), or "nothing".
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    turns: tuple[tuple[int, ...], ...]
    room: int | None
    before: str
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts = TextModel.draw(draws), Prompts.draw(draws, longest=60)
        rows = len(prompts.lengths)
        turns = tuple(tuple(draws.randint(1, 9) for _ in range(rows)) for _ in range(draws.randint(1, 3)))
        budget = draw_budget(draws, prompts.width, covering=draws.is_rare(0.2))
        before = draws.one_of("step", "end_prompt", "copy", "nothing")
        room, score = draws.one_of(None, None, draws.randint(1, 30)), draw_score(draws, refit=False)
        return cls(model, prompts, budget, turns, room, before, score)

    def run(self, bench: Bench) -> Outcome:
        model, inputs = bench.text(self.model), self.prompts.inputs(bench.device)
        prompt = inputs["attention_mask"]
        cache = ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))
        run_pass(model, cache, inputs["input_ids"], prompt)
        pieces, mask = self._pieces(bench), prompt
        if self.before == "end_prompt":
            cache.end_prompt()
        elif self.before == "copy":
            cache = copy.deepcopy(cache)
        found = []
        for piece in pieces:
            mask = torch.cat([mask, piece["attention_mask"]], dim=1)
            found.append(run_pass(model, cache, piece["input_ids"], mask))
        ids = [inputs["input_ids"], *(piece["input_ids"] for piece in pieces)]
        later = mask[:, self.prompts.width :]
        expected = masked_logits(model, ids, prompt, kept_by_layer(cache), later)[1:]
        for turn, (piece, mine, theirs) in enumerate(zip(pieces, found, expected, strict=True)):
            real = piece["attention_mask"].bool()
            assert_close(mine[real], theirs[real], f"logits of turn {turn}")
        return Outcome.PASSED

    def _pieces(self, bench: Bench) -> list[dict[str, torch.Tensor]]:
        lengths = [[1] * len(self.prompts.lengths)] if self.before == "step" else []
        lengths += [list(turn) for turn in self.turns]
        padded = (models.left_padded(turn, seed=seed) for seed, turn in enumerate(lengths))
        return [{name: part.to(bench.device) for name, part in piece.items()} for piece in padded]
