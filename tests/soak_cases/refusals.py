"""What the documents say is refused, and that nothing is changed by it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

import models
from mmshiftkv import ShiftKVCache, decode_ahead

from .bench import Bench, Prompts, Settings, TextModel, draw_budget, draw_score, tokens_kept
from .case import Case, Draws, Outcome, refused
from .checks import assert_close, check_kept, check_lengths, full_cache, generate, prefilled, run_pass
from .chunks import chunked_settings
from .copies import assert_same_state, state_of


@dataclass(frozen=True)
class Refusals(Case):
    """What is refused leaves the cache as it was, or empty if it was a prompt; all goes on as if nothing had been.

    Attributes:
        what: the name of one of the methods below.
        room: `max_new_tokens` of the cache.
        ahead: the answers are those of `decode_ahead`.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    what: str
    room: int
    ahead: bool
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts = TextModel.draw(draws, sliding=0.0), Prompts.draw(draws, shortest=3, longest=50)
        budget = draw_budget(draws, prompts.width, covering=draws.is_rare(0.2))
        what = draws.choice(["another_prompt", "nothing_new", "no_tokens", "another_model", "too_long", "wrong_crop"])
        room, ahead = draws.randint(1, 12), draws.is_rare(0.3)
        return cls(model, prompts, budget, what, room, ahead, draw_score(draws))

    def run(self, bench: Bench) -> Outcome:
        model, inputs = bench.text(self.model), self.prompts.inputs(bench.device)
        settings: dict[str, Any] = {"max_new_tokens": self.room}
        if self.what == "too_long":
            settings = chunked_settings("told", self.prompts.width, self.room)
        cache, twin = (ShiftKVCache(model, budget=self.budget, **settings, **dict(self.score)) for _ in range(2))
        refuse: Callable[..., None] = getattr(self, self.what)
        refuse(bench, model, inputs, cache)
        assert models.hooks_on(model) == 0, "hooks are left on the model"
        answers = []
        for each in (cache, twin):
            if not int(each.get_seq_length()):
                each.reset()
            ids = inputs["input_ids"]
            if each is twin and self.what in ("another_prompt", "nothing_new", "wrong_crop"):
                self._answer(model, each, ids, inputs["attention_mask"])
            if self.what in ("another_prompt", "nothing_new", "wrong_crop"):
                ids = torch.cat([ids, models.prompt_ids(ids.shape[0], 8).to(ids.device)], dim=1)
            answers.append(self._answer(model, each, ids, inputs["attention_mask"]))
        assert answers[0].equal(answers[1]), "another answer than without the refusal"
        return Outcome.REFUSED

    def _answer(
        self, model: PreTrainedModel, cache: ShiftKVCache, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        mask = torch.cat([mask, mask.new_ones(ids.shape[0], ids.shape[1] - mask.shape[1])], dim=1)
        own = {"custom_generate": decode_ahead} if self.ahead else {}
        inputs = {"input_ids": ids, "attention_mask": mask}
        return generate(model, inputs, cache, max_new_tokens=4, eos_token_id=None, **own).sequences

    def another_prompt(self, bench: Bench, model: PreTrainedModel, inputs: Any, cache: ShiftKVCache) -> None:
        """A turn of `generate` that does not begin with the prompt."""
        self._answer(model, cache, inputs["input_ids"], inputs["attention_mask"])
        state = state_of(cache)
        other = torch.cat([inputs["input_ids"]] * 3, dim=1)
        place = self.prompts.width - 1
        other[0, place] = 3 + (other[0, place] - 2) % 125  # another token
        with refused(r"reset\(\)"):
            self._answer(model, cache, other, inputs["attention_mask"])
        assert_same_state(state_of(cache), state, "the cache that refused")

    def nothing_new(self, bench: Bench, model: PreTrainedModel, inputs: Any, cache: ShiftKVCache) -> None:
        """A turn of `generate` with no more than the cache has seen."""
        found = self._answer(model, cache, inputs["input_ids"], inputs["attention_mask"])
        state = state_of(cache)
        with refused("nothing new"):
            self._answer(model, cache, found[:, : int(cache.get_seq_length())], inputs["attention_mask"])
        assert_same_state(state_of(cache), state, "the cache that refused")

    def no_tokens(self, bench: Bench, model: PreTrainedModel, inputs: Any, cache: ShiftKVCache) -> None:
        """An empty prompt."""
        with refused("the prompt is empty"):
            run_pass(model, cache, inputs["input_ids"][:, :0])
        check_lengths(cache, 0, 0)

    def another_model(self, bench: Bench, model: PreTrainedModel, inputs: Any, cache: ShiftKVCache) -> None:
        """A prompt that another model is given."""
        if tokens_kept(self.budget, self.prompts.width) == self.prompts.width:
            self.no_tokens(bench, model, inputs, cache)
            return
        other = bench.text(TextModel(**{**vars(self.model), "weights": 1 - self.model.weights}))
        with refused("another model"):
            prefilled(other, cache, inputs)
        check_lengths(cache, 0, 0)

    def too_long(self, bench: Bench, model: PreTrainedModel, inputs: Any, cache: ShiftKVCache) -> None:
        """More columns than `prompt_length`."""
        longer = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], dim=1)
        with refused("prompt_length"):
            run_pass(model, cache, longer)
        check_lengths(cache, 0, 0)

    def wrong_crop(self, bench: Bench, model: PreTrainedModel, inputs: Any, cache: ShiftKVCache) -> None:
        """A crop into a compressed prompt, or beyond the first token, and a crop of less than nothing."""
        self._answer(model, cache, inputs["input_ids"], inputs["attention_mask"])
        state, report = state_of(cache), cache.report()
        least = self.prompts.width if report.tokens_stored < report.tokens_seen else 0
        for count in (1, least - report.tokens_seen - 1):
            with refused("tokens_to_remove"):
                cache.crop(count)
        assert_same_state(state_of(cache), state, "the cache that refused")


@dataclass(frozen=True)
class Masks(Case):
    """Padding anywhere and ready-made masks are as with the full cache where the budget covers, refused elsewhere.

    Attributes:
        width: columns of the prompt.
        hidden: the columns that are padding, by row; the first row has none.
        ready_made: a 4-D mask says so.
        room: `max_new_tokens` of the cache.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    width: int
    budget: int | float
    hidden: tuple[tuple[int, ...], ...]
    ready_made: bool
    room: int | None
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        width = draws.randint(3, 40)
        kinds = [
            tuple(range(draws.randint(1, width - 1), width)),  # on the right
            (draws.randint(1, width - 2),),  # between tokens
            tuple(draws.sample(range(width), draws.randint(1, width - 1))),
        ]
        hidden = ((), *(tuple(sorted(draws.choice(kinds))) for _ in range(draws.randint(1, 2))))
        budget = draw_budget(draws, width, covering=draws.is_rare(0.5))
        model, ready_made, room = TextModel.draw(draws, sliding=0.0), draws.is_rare(0.3), draws.one_of(None, 5)
        return cls(model, width, budget, hidden, ready_made, room, draw_score(draws))

    def run(self, bench: Bench) -> Outcome:
        model, rows = bench.text(self.model), len(self.hidden)
        ids = models.prompt_ids(rows, self.width, seed=self.width).to(bench.device)
        mask = torch.ones_like(ids)
        for row, columns in enumerate(self.hidden):
            mask[row, list(columns)] = 0
        cache = ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))
        if not self._is_accepted(mask):
            with refused("4-D|padding"):
                self._prefill(model, cache, ids, mask)
            check_lengths(cache, 0, 0)
            assert models.hooks_on(model) == 0, "hooks are left on the model"
            return Outcome.REFUSED
        if tokens_kept(self.budget, self.width) < self.width:  # the padding happens to be on the left
            self._prefill(model, cache, ids, mask)
            check_kept(cache, mask, self.budget)
            return Outcome.PASSED
        logits = []
        for each in (cache, full_cache(model)):
            self._prefill(model, each, ids, mask)
            later = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            logits.append(run_pass(model, each, ids[:, :1], later))
        assert_close(*logits, "logits of the next token")
        return Outcome.PASSED

    def _is_accepted(self, mask: torch.Tensor) -> bool:
        if tokens_kept(self.budget, self.width) == self.width:
            return True
        is_left = (mask.diff(dim=1) >= 0).all() and mask.any(dim=1).all()
        return bool(is_left) and not self.ready_made

    def _prefill(self, model: PreTrainedModel, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        if not self.ready_made:
            run_pass(model, cache, ids, mask)
            return
        columns = torch.ones(self.width, self.width, dtype=torch.bool, device=ids.device).tril()
        # A padding token sees itself, as a row of nothing has no attention.
        shown = columns & (mask[:, None, None].bool() | torch.eye(self.width, dtype=torch.bool, device=ids.device))
        if self.model.attention == "eager":
            lowest = torch.finfo(torch.float32).min
            shown = torch.zeros(shown.shape, device=ids.device).masked_fill(~shown, lowest)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        run_pass(model, cache, ids, attention_mask=shown, position_ids=positions)
