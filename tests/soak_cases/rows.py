"""Rows of a batch: padded ones against the same row alone, and rows that are reordered, repeated and chosen."""

from dataclasses import dataclass
from typing import Any, Self

import torch

import models
from mmshiftkv import PrefillSelectionCache, ShiftKVCache

from .bench import Bench, Prompts, Settings, TextModel, draw_budget, draw_score
from .case import Case, Draws, Outcome, refused
from .checks import (
    assert_close,
    check_kept,
    check_lengths,
    compare_kept,
    kept_by_layer,
    masked_logits,
    prefilled,
    run_pass,
)
from .chunks import chunked_settings


@dataclass(frozen=True)
class RowAlone(Case):
    """A row of a left-padded batch keeps the columns that it keeps alone, and gets the same logits.

    Attributes:
        row: the one that is run alone.
        steps: tokens fed behind the prompt, one by one.
        room: `max_new_tokens` of the batch's cache.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int
    row: int
    steps: int
    room: int | None
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model = TextModel.draw(draws)
        width = draws.randint(2, 70)
        lengths = (width, *(draws.randint(1, width) for _ in range(draws.randint(1, 3))))
        prompts = Prompts(lengths, draws.randrange(2**31))
        budget = draws.randint(1, width + 3)
        row, steps, room = draws.randrange(len(lengths)), draws.randint(1, 5), draws.one_of(None, None, 6)
        return cls(model, prompts, budget, row, steps, room, draw_score(draws))

    def run(self, bench: Bench) -> Outcome:
        model, inputs = bench.text(self.model), self.prompts.inputs(bench.device)
        length = self.prompts.lengths[self.row]
        padding = self.prompts.width - length
        own = {name: part[self.row : self.row + 1, padding:] for name, part in inputs.items()}
        score = dict(self.score)
        together = prefilled(model, ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **score), inputs)
        alone = prefilled(model, ShiftKVCache(model, budget=self.budget, **score), own)
        check_kept(together, inputs["attention_mask"], self.budget)
        check_kept(alone, own["attention_mask"], self.budget)
        outcome = compare_kept(self._columns(together, padding), kept_by_layer(alone))
        if outcome is Outcome.TIED:
            return outcome  # other columns, other logits
        mask = inputs["attention_mask"]
        for step in range(self.steps):
            token = models.prompt_ids(len(self.prompts.lengths), 1, seed=step).to(bench.device)
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            found = run_pass(model, together, token, mask)[self.row]
            expected = run_pass(model, alone, token[self.row : self.row + 1])[0]
            assert_close(found, expected, f"step {step}")
        return outcome

    def _columns(self, cache: PrefillSelectionCache, padding: int) -> dict[int, torch.Tensor | None]:
        """What the row keeps of its own tokens, counted from its first one."""
        columns: dict[int, torch.Tensor | None] = {}
        for index, kept in kept_by_layer(cache).items():
            if kept is not None:
                mine = kept[self.row]
                kept = mine[mine >= padding].view(1, mine.shape[0], -1) - padding
            columns[index] = kept
        return columns


@dataclass(frozen=True)
class RowChange:
    """One change of a cache's rows.

    Attributes:
        call: "reorder", "repeat", "tensor", "list", "tuple" or "mask", the last four of `batch_select_indices`.
        numbers: the rows that are taken, or how often each is repeated.
    """

    call: str
    numbers: tuple[int, ...]

    @classmethod
    def draw(cls, draws: Draws, rows: int) -> Self:
        """A change of so many rows."""
        call = draws.one_of("reorder", "repeat", "tensor", "list", "tuple", "mask")
        if call == "repeat" and rows <= 4:
            return cls(call, (draws.randint(1, 3),))
        if call == "mask":
            return cls(call, tuple(sorted(draws.sample(range(rows), draws.randint(1, rows)))))
        count = rows if call == "reorder" else draws.randint(1, rows + 1)
        return cls("reorder" if call == "repeat" else call, tuple(draws.randrange(rows) for _ in range(count)))

    def source(self, rows: int) -> list[int]:
        """The old row of each new one."""
        if self.call == "repeat":
            return [row for row in range(rows) for _ in range(self.numbers[0])]
        return list(self.numbers)

    def apply(self, cache: Any, rows: int, device: torch.device) -> None:
        """Changes a cache that has so many rows."""
        if self.call == "reorder":
            cache.reorder_cache(torch.tensor(self.numbers, device=device))
        elif self.call == "repeat":
            cache.batch_repeat_interleave(self.numbers[0])
        elif self.call == "mask":
            cache.batch_select_indices(torch.tensor([row in self.numbers for row in range(rows)], device=device))
        else:
            indices = {"tensor": torch.tensor(self.numbers), "list": list(self.numbers), "tuple": self.numbers}
            cache.batch_select_indices(indices[self.call])


@dataclass(frozen=True)
class RowChanges(Case):
    """After rows were changed, each goes on as the row that it was, on the masked full cache.

    Attributes:
        changes: each with how many tokens are fed before it, one by one.
        room: `max_new_tokens` of the cache.
        chunked: the prompt comes in chunks of unknown length, and ends with the first change.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    changes: tuple[tuple[int, RowChange], ...]
    room: int | None
    chunked: bool
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts = TextModel.draw(draws, sliding=0.0), Prompts.draw(draws, shortest=2)
        rows, changes = len(prompts.lengths), []
        chunked = draws.is_rare(0.15)
        for number in range(draws.randint(1, 3)):
            change = RowChange.draw(draws, rows)
            changes.append((0 if chunked and not number else draws.randint(0, 3), change))
            rows = len(change.source(rows))
        room = draws.one_of(None, 3, 14)
        budget, score = draw_budget(draws, prompts.width), draw_score(draws, refit=False)
        return cls(model, prompts, budget, tuple(changes), room, chunked, score)

    def run(self, bench: Bench) -> Outcome:
        model, inputs = bench.text(self.model), self.prompts.inputs(bench.device)
        own = chunked_settings("untold" if self.chunked else "single", self.prompts.width, self.room)
        cache = prefilled(model, ShiftKVCache(model, budget=self.budget, **own, **dict(self.score)), inputs)
        ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], None
        for steps, change in self.changes:
            for _ in range(steps):
                ids, logits = self._step(model, cache, ids, mask)
            rows = ids.shape[0]
            before, source = kept_by_layer(cache), change.source(rows)
            change.apply(cache, rows, bench.device)
            ids, mask = ids[source], mask[source]
            for index, kept in kept_by_layer(cache).items():
                assert before[index] is None or kept.equal(before[index][source]), f"layer {index}: other rows are kept"
            check_kept(cache, mask, self.budget)
        ids, logits = self._step(model, cache, ids, mask)
        stored = cache.kept_indices(0).shape[-1] + ids.shape[1] - self.prompts.width
        check_lengths(cache, ids.shape[1], stored)
        prompt, rest = ids[:, : self.prompts.width], ids[:, self.prompts.width :]
        expected = masked_logits(model, [prompt, rest], mask, kept_by_layer(cache))[1]
        assert_close(logits[:, -1], expected[:, -1], "logits after the last change")
        return Outcome.PASSED

    def _step(self, model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Feeds one token to each row: all ids so far, and the logits."""
        token = models.prompt_ids(ids.shape[0], 1, seed=ids.shape[1]).to(ids.device)
        ids = torch.cat([ids, token], dim=1)
        later = mask.new_ones(mask.shape[0], ids.shape[1] - mask.shape[1])
        return ids, run_pass(model, cache, token, torch.cat([mask, later], dim=1))


@dataclass(frozen=True)
class OneRowForAll(Case):
    """A one-row cache takes the rows of a batch, and each goes on as its copy; other numbers of rows are refused.

    Attributes:
        rows: of the batch behind the prompt.
        held: rows of the cache.
        steps: tokens fed to each row, one by one.
        room: `max_new_tokens` of the cache.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    rows: int
    held: int
    steps: int
    room: int | None
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        held, width = draws.one_of(1, 1, 1, 2, 3), draws.randint(1, 60)
        rows = draws.choice([count for count in (2, 3, 4) if count != held])
        prompts = Prompts((width,) * held, draws.randrange(2**31))
        model, budget = TextModel.draw(draws, sliding=0.0), draw_budget(draws, width)
        steps, room = draws.randint(1, 4), draws.one_of(None, 2, 9)
        return cls(model, prompts, budget, rows, held, steps, room, draw_score(draws, refit=False))

    def run(self, bench: Bench) -> Outcome:
        model, inputs = bench.text(self.model), self.prompts.inputs(bench.device)
        cache = ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))
        prefilled(model, cache, inputs)
        tokens = models.prompt_ids(self.rows, self.steps, seed=self.prompts.seed).to(bench.device)
        if self.held > 1:
            return self._is_refused(model, cache, tokens)
        found = torch.cat([run_pass(model, cache, token) for token in tokens.split(1, dim=1)], dim=1)
        kept = kept_by_layer(cache)
        assert all(part.shape[0] == self.rows for part in kept.values() if part is not None)
        ids, mask = (inputs[name].expand(self.rows, -1) for name in ("input_ids", "attention_mask"))
        expected = masked_logits(model, [ids, tokens], mask, kept)[1]
        assert_close(found, expected, "logits of the rows")
        return Outcome.PASSED

    def _is_refused(self, model: Any, cache: Any, tokens: torch.Tensor) -> Outcome:
        with refused(r"call reset\(\)"):
            run_pass(model, cache, tokens[:, :1])
        width = self.prompts.width
        check_lengths(cache, width, cache.kept_indices(0).shape[-1])
        return Outcome.REFUSED
