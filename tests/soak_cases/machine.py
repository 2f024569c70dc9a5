"""Random sequences of public calls, with a model of what the cache should hold."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from transformers import PreTrainedModel

import models
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache

from .bench import Bench, Prompts, Settings, TextModel, draw_budget, draw_score, tokens_kept
from .case import Case, Draws, Outcome, Planted, PlantedInterrupt, refused
from .checks import assert_close, check_kept, check_lengths, generate, kept_by_layer, masked_logits, run_pass
from .chunks import chunked_settings
from .copies import assert_same_state, state_of
from .interrupts import planted
from .rows import RowChange

_MOST_ROWS = 6
# transformers 5.17 passes the whole conversation again, to every cache; seen to be right in the version that calls the
# argument "cache".
_CHUNKS_TURNS = CACHE_ARGUMENT == "cache"


@dataclass(frozen=True)
class Machine(Case):
    """Whatever calls follow each other, the cache holds what it should, and refuses the rest without a change.

    Attributes:
        prefill: "single"; "told" or "untold", in chunks with or without `prompt_length`.
        room: `max_new_tokens` of the cache.
        calls: names of `Calls.ALL`, each with a seed of its arguments.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    prefill: str
    room: int | None
    calls: tuple[tuple[str, int], ...]
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts = TextModel.draw(draws, sliding=0.0), Prompts.draw(draws, longest=40)
        prefill = draws.one_of("single", "single", "told", "untold")
        room = draws.one_of(None, 1, draws.randint(2, 20))
        names = [name for name, weight in Calls.ALL.items() for _ in range(weight)]
        calls = tuple((draws.choice(names), draws.randrange(2**31)) for _ in range(draws.randint(6, 25)))
        budget = draw_budget(draws, prompts.width, covering=draws.is_rare(0.25))
        first = draws.one_of("feed", "answer"), draws.randrange(2**31)
        return cls(model, prompts, budget, prefill, room, (first, *calls), draw_score(draws, refit=False))

    def run(self, bench: Bench) -> Outcome:
        calls = Calls(self, bench)
        for number, (name, seed) in enumerate(self.calls):
            try:
                getattr(calls, name)(Draws(name, seed))
                calls.check()
            except Exception as error:
                error.add_note(f"call {number}, {name}, of {[name for name, _ in self.calls]}")
                raise
        calls.check_logits()
        calls.check_others()
        return Outcome.REFUSED if calls.refusals else Outcome.PASSED


class Calls:
    """The calls, and what the cache should hold after each.

    Attributes:
        ALL: the names of the calls, and how often each is drawn.
        refusals: how many calls were refused, as they should be.
    """

    ALL: ClassVar[dict[str, int]] = {
        "feed": 4,
        "step": 4,
        "turn": 2,
        "answer": 4,
        "end_prompt": 1,
        "crop": 2,
        "crop_too_much": 1,
        "rows": 3,
        "other_rows": 1,
        "copy": 2,
        "ask": 2,
        "fail": 1,
        "reset": 1,
        "compare": 1,
    }

    def __init__(self, case: Machine, bench: Bench) -> None:
        self._case = case
        self._model: PreTrainedModel = bench.text(case.model)
        self._prompt = case.prompts.inputs(bench.device)
        own = chunked_settings(case.prefill, case.prompts.width, case.room)
        self.cache = ShiftKVCache(self._model, budget=case.budget, **own, **dict(case.score))
        self.refusals = 0
        self._others: list[tuple[ShiftKVCache, list[Any]]] = []
        self._forget()

    def _forget(self) -> None:
        self.ids, self.mask = (self._prompt[name][:, :0] for name in ("input_ids", "attention_mask"))
        self.width: int | None = None  # of the prompt, once it has ended
        self.kept: dict[int, torch.Tensor | None] = {}

    @property
    def is_compressed(self) -> bool:
        """Whether tokens of the prompt were dropped."""
        return self.width is not None and tokens_kept(self._case.budget, self.width) < self.width

    @property
    def _rows(self) -> int:
        return self.ids.shape[0]

    def check(self) -> None:
        """The cache holds what it should."""
        seen = self.ids.shape[1]
        assert models.hooks_on(self._model) == 0, "hooks are left on the model"
        if self.width is None:
            check_lengths(self.cache, seen, seen)
            assert all(kept is None for kept in kept_by_layer(self.cache).values()), "the prompt has not ended"
            return
        check_kept(self.cache, self.mask, self._case.budget)
        check_lengths(self.cache, seen, tokens_kept(self._case.budget, self.width) + seen - self.width)
        for index, kept in kept_by_layer(self.cache).items():
            assert kept.equal(self.kept[index]), f"layer {index}: other columns are kept"

    def check_others(self) -> None:
        """Caches that were copied, or that copies were made of, have not changed."""
        for number, (cache, state) in enumerate(self._others):
            assert_same_state(state_of(cache), state, f"cache {number} that was left")

    def check_logits(self) -> None:
        """The next token gets the logits of the masked full cache."""
        if self.width is None:
            return
        logits = self._pass(models.prompt_ids(self._rows, 1, seed=self.ids.shape[1]))
        prompt, later = self.ids[:, : self.width], self.ids[:, self.width :]
        expected = masked_logits(self._model, [prompt, later], self.mask, self.kept)[1]
        assert_close(logits[:, -1], expected[:, -1], "logits of the next token")
        self.check()

    # Calls, each with what it changes.

    def feed(self, draws: Draws) -> None:
        """The prompt, or its next chunk; one token once it has ended."""
        fed, width = self.ids.shape[1], self._case.prompts.width
        if self.width is not None:
            self.step(draws)
            return
        size = width if self._case.prefill == "single" else min(draws.randint(1, 20), width - fed)
        if size == 0 or (size == 1 and fed and self._case.prefill == "untold"):
            self._refuse_one_token()
            return
        self._feed(size)

    def _feed(self, size: int) -> None:
        fed = self.ids.shape[1]
        self.mask = self._prompt["attention_mask"][:, : fed + size]
        piece = self._prompt["input_ids"][:, fed : fed + size]
        run_pass(self._model, self.cache, piece, self.mask)
        self.ids = torch.cat([self.ids, piece], dim=1)
        if self._case.prefill == "single" or (self._case.prefill == "told" and fed + size == self._case.prompts.width):
            self._ended()

    def _ended(self, width: int | None = None) -> None:
        self.width = self.ids.shape[1] if width is None else width
        self.kept = kept_by_layer(self.cache)

    def _refuse_one_token(self) -> None:
        """Of a prompt of unknown length, one token may be the last chunk or the answer's first token."""
        token = models.prompt_ids(self._rows, 1).to(self.ids.device)
        with refused("end_prompt|prompt_length"):
            run_pass(self._model, self.cache, token, torch.cat([self.mask, torch.ones_like(token)], dim=1))
        self.refusals += 1

    def step(self, draws: Draws) -> None:
        """One token."""
        if self.width is None:
            self.feed(draws)
        else:
            self._pass(models.prompt_ids(self._rows, 1, seed=draws.randrange(1000)))

    def turn(self, draws: Draws) -> None:
        """Several tokens."""
        if self.width is None:
            self.feed(draws)
            return
        self._pass(models.prompt_ids(self._rows, draws.randint(2, 8), seed=draws.randrange(1000)))

    def answer(self, draws: Draws) -> None:
        """`generate`, with the prompt or with a turn."""
        options: dict[str, Any] = {"max_new_tokens": draws.randint(1, 4), "eos_token_id": None}
        if self.width is None and self.ids.shape[1]:
            return
        # Without chunks of its own `generate` does not say where a chunked prompt ends.
        if draws.is_rare(0.3) or (self.width is None and self._case.prefill == "untold"):
            options["prefill_chunk_size"] = draws.randint(1, 12)
        if self.width is not None and not _CHUNKS_TURNS:
            options.pop("prefill_chunk_size", None)
        if self.width is None:
            self.mask, ids = self._prompt["attention_mask"], self._prompt["input_ids"]
        else:
            more = models.prompt_ids(self._rows, draws.randint(1, 5), seed=draws.randrange(1000))
            ids = torch.cat([self.ids, more.to(self.ids.device)], dim=1)
        inputs = {"input_ids": ids, "attention_mask": self._whole_mask(ids.shape[1])}
        found = generate(self._model, inputs, self.cache, **options)
        self.ids = found.sequences[:, :-1]
        if self.width is None:
            self._ended(ids.shape[1])

    def _pass(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(self.ids.device)
        mask = self._whole_mask(self.ids.shape[1] + ids.shape[1])
        logits = run_pass(self._model, self.cache, ids, mask)
        self.ids = torch.cat([self.ids, ids], dim=1)
        return logits

    def _whole_mask(self, columns: int) -> torch.Tensor:
        return torch.cat([self.mask, self.mask.new_ones(self._rows, columns - self.mask.shape[1])], dim=1)

    def _can_end(self) -> bool:
        """A row of padding only is no prompt."""
        return self.ids.shape[1] > 0 and bool(self.mask.any(dim=1).all())

    def end_prompt(self, draws: Draws) -> None:
        """Ends the prompt; nothing happens if there is none, or if it has ended."""
        if self.width is None and self.ids.shape[1] and not self._can_end():
            return
        self.cache.end_prompt()
        if self.width is None and self.ids.shape[1]:
            self._ended()

    def crop(self, draws: Draws) -> None:
        """Takes back as many tokens as may be."""
        seen = self.ids.shape[1]
        if self.width is None:
            self.cache.crop(0)
            return
        # A row must keep one token.
        least = self.width if self.is_compressed else int(self.mask.argmax(dim=1).max()) + 1
        left = seen if seen <= least else draws.choice([seen, least, draws.randint(least, seen)])
        self.cache.crop(left - seen)
        self.ids = self.ids[:, :left]
        if left < self.width:
            self.width, self.mask = left, self.mask[:, :left]
            self.kept = {index: kept[..., :left] for index, kept in self.kept.items()}

    def crop_too_much(self, draws: Draws) -> None:
        """More than may be taken back, or less than nothing."""
        seen = self.ids.shape[1]
        if self.width is None and seen:
            count = -1
        else:
            least = self.width if self.is_compressed else 0
            count = draws.choice([1, least - seen - draws.randint(1, 9)])
        with refused("tokens_to_remove"):
            self.cache.crop(count)
        self.refusals += 1

    def rows(self, draws: Draws) -> None:
        """Reorders, repeats or chooses rows; that ends a prompt."""
        change = RowChange.draw(draws, self._rows)
        source = change.source(self._rows)
        if len(source) > _MOST_ROWS or (self.ids.shape[1] and self.width is None and not self._can_end()):
            return
        before = {index: kept for index, kept in kept_by_layer(self.cache).items() if kept is not None}
        change.apply(self.cache, self._rows, self.ids.device)
        if not self.ids.shape[1]:
            return
        was_open = self.width is None
        if was_open:
            self._ended()
        else:
            self.kept = {index: kept[source] for index, kept in before.items()}
        self.ids, self.mask = self.ids[source], self.mask[source]

    def other_rows(self, draws: Draws) -> None:
        """A batch of another size; one row is repeated for it."""
        if self.width is None or self._rows + 1 > _MOST_ROWS:
            return
        rows = self._rows + draws.choice([1, 2])
        ids = models.prompt_ids(rows, 1, seed=5)
        if self._rows > 1:
            mask = self._whole_mask(self.ids.shape[1] + 1)[:1].expand(rows, -1)
            with refused(r"call reset\(\)"):
                run_pass(self._model, self.cache, ids.to(self.ids.device), mask)
            self.refusals += 1

            return
        self.ids, self.mask = self.ids.expand(rows, -1), self.mask.expand(rows, -1)
        self.kept = {index: kept.expand(rows, -1, -1) for index, kept in self.kept.items()}
        self._pass(ids)

    def copy(self, draws: Draws) -> None:
        """Goes on with a deep copy, or with the original."""
        twin = copy.deepcopy(self.cache)
        state = state_of(self.cache)
        assert_same_state(state_of(twin), state, "the copy")
        if draws.is_rare(0.5):
            self.cache, twin = twin, self.cache
        self._others.append((twin, state))

    def ask(self, draws: Draws) -> None:
        """What changes nothing."""
        state = state_of(self.cache)
        str(self.cache.report())
        assert isinstance(self.cache.is_compileable, bool)
        if self.width is not None:
            layer = draws.randrange(len(self.cache.layers))
            length, offset = self.cache.get_mask_sizes(1, layer)

            seen = self.ids.shape[1]
            assert offset == seen - self.cache.report().tokens_stored
            assert length + offset > seen
        assert_same_state(state_of(self.cache), state, "the cache that was asked")

    def fail(self, draws: Draws) -> None:
        """An exception or an interrupt in a pass, and then a reset."""
        if self.width is None and self.ids.shape[1] == self._case.prompts.width:
            return
        size = self._case.prompts.width - self.ids.shape[1]
        if self.width is None and size == 1 and self.ids.shape[1] and self._case.prefill == "untold":
            return
        error, layer = draws.choice([Planted, PlantedInterrupt]), draws.randrange(3)
        was_raised = False
        with planted(self._model, layer, draws.choice(["self_attn", "mlp"]), draws.is_rare(0.5), error):
            try:
                if self.width is None:
                    self._feed(size)
                else:
                    self._pass(models.prompt_ids(self._rows, 1))
            except error:
                was_raised = True
        assert was_raised, "the planted exception did not come through"
        if self.width is None and error is Planted:
            assert int(self.cache.get_seq_length()) == 0, "the cache is not empty after a prefill that failed"
        self.reset(draws)

    def reset(self, draws: Draws) -> None:
        """Empties the cache."""
        self.cache.reset()
        self._forget()

    def compare(self, draws: Draws) -> None:
        """Compares the logits of the next token."""
        self.check_logits()
