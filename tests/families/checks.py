"""What each family is checked for."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from transformers import DynamicCache, PreTrainedModel, StaticCache

from masked_reference import dropped_entries_masked
from mmshiftkv import ShiftKVCache

from .generating import NEW_TOKENS, Answer, answer, difference, is_close
from .inputs import Inputs, Prompts
from .surroundings import changes, seen_around

BUDGET = 12
PASSED = "passed"
CHECKS = ("covering_budget", "small_budget", "left_padding", "fixed_storage")


class Checks:
    """The checks of one model; each says "passed", or what came instead.

    Args:
        model: the model.
        prompts: what it is given.
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts) -> None:
        self._model = model
        self._prompts = prompts
        self._inputs = prompts.first
        self._expected = self._plain_answer(prompts.first)

    def run(self, names: Sequence[str]) -> dict[str, str]:
        """Runs these checks, by the names of their methods, and looks at what they leave behind."""
        # Not before the first answer: transformers itself leaves hooks on towers whose hidden states it wants.
        before = seen_around(self._model)
        results = {name: _guarded(getattr(self, name)) for name in names}
        left = changes(before, seen_around(self._model))
        return {**results, "nothing_left": f"changed and left so: {', '.join(left)}" if left else PASSED}

    def covering_budget(self) -> str:
        """A budget that covers the prompt gives the logits of DynamicCache, bit by bit."""
        found = answer(self._model, self._inputs, ShiftKVCache(self._model, budget=self._prompts.columns))
        return difference(found, self._expected) or PASSED

    def small_budget(self) -> str:
        """A small budget gives what a full cache gives whose dropped entries are masked out."""
        cache = ShiftKVCache(self._model, budget=BUDGET)
        found = answer(self._model, self._inputs, cache)
        kept = {index: cache.kept_indices(index) for index in range(len(cache.layers))}
        wrong = [index for index, each in kept.items() if each is not None and each.shape[-1] != BUDGET]
        if wrong or all(each is None for each in kept.values()):
            return f"layers {wrong} keep another number of tokens than the budget"
        try:
            with dropped_entries_masked(self._model, kept, self._inputs["attention_mask"].bool()):
                masked = self._plain_answer(self._inputs)
        except Exception as error:
            return f"not checked: the reference with masks fails: {told(error)}"
        if difference(masked, self._expected) is None:
            return "not checked: the masks of the reference have no effect"
        return PASSED if is_close(found, masked) else str(difference(found, masked))

    def left_padding(self) -> str:
        """In a left-padded batch each row is as alone."""
        found = _guarded(lambda: self._rows_differ(lambda: ShiftKVCache(self._model, budget=BUDGET)))
        if found == PASSED:
            return found
        plain = _guarded(lambda: self._rows_differ(lambda: DynamicCache(config=self._model.config)))
        return found if plain == PASSED else f"not checked: the same with DynamicCache: {plain}"

    def _static_cache_differs(self) -> str | None:
        slots = self._prompts.columns + NEW_TOKENS
        static = answer(self._model, self._inputs, StaticCache(config=self._model.config, max_cache_len=slots))
        if is_close(static, self._expected):
            return None
        return f"not checked: the same with StaticCache: {difference(static, self._expected)}"

    def _rows_differ(self, make: Callable[[], Any]) -> str:
        together = answer(self._model, self._prompts.batch, make())
        for index, row in enumerate([self._prompts.first, self._prompts.second]):
            alone = answer(self._model, row, make())
            mine = Answer(together.tokens[index : index + 1], together.logits[index : index + 1])
            if not is_close(mine, alone):
                return f"row {index}: {difference(mine, alone)}"
        return PASSED

    def _plain_answer(self, inputs: Inputs) -> Answer:
        return answer(self._model, inputs, DynamicCache(config=self._model.config))

    def fixed_storage(self) -> str:
        """With max_new_tokens the answer is the same; says whether decoding compiles, or why not."""
        growing = answer(self._model, self._inputs, ShiftKVCache(self._model, budget=BUDGET))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = ShiftKVCache(self._model, budget=BUDGET, max_new_tokens=NEW_TOKENS)
        obstacle = next((str(each.message) for each in caught if "reserves nothing" in str(each.message)), None)
        found = answer(self._model, self._inputs, cache)
        if not is_close(found, growing):
            return self._static_cache_differs() or str(difference(found, growing))
        if obstacle is not None:
            return "grows: " + obstacle.rpartition("not compiled: ")[2]
        return "compiled" if cache.is_compileable else "grows: no warning was given"


def _guarded(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        return told(error)


def told(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
