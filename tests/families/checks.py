"""What each family is checked for."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from masked_reference import dropped_entries_masked
from mmshiftkv import ShiftKVCache

from .generating import NEW_TOKENS, Answer, answer, difference, is_close
from .inputs import left_padded, prompt

BUDGET = 12
PASSED = "passed"
CHECKS = ("covering_budget", "small_budget", "left_padding", "fixed_storage")


class Checks:
    """The checks of one model; each says "passed", or what came instead.

    Args:
        model: the model.
        inputs: a prompt of one row.
        second: another one, of another length, for a batch of two; None: text.
    """

    def __init__(
        self, model: PreTrainedModel, inputs: dict[str, Any], second: dict[str, Any] | None = None
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._second = prompt(tokens=27, seed=1) if second is None else second
        self._columns = inputs["input_ids"].shape[1]
        self._expected = answer(model, inputs, DynamicCache(config=model.config))

    def run(self, names: Sequence[str]) -> dict[str, str]:
        """Runs these checks, by the names of their methods."""
        return {name: _guarded(getattr(self, name)) for name in names}

    def covering_budget(self) -> str:
        """A budget that covers the prompt gives the logits of DynamicCache, bit by bit."""
        found = answer(self._model, self._inputs, ShiftKVCache(self._model, budget=self._columns))
        return difference(found, self._expected) or PASSED

    def small_budget(self) -> str:
        """A small budget gives what a full cache gives whose dropped entries are masked out."""
        cache = ShiftKVCache(self._model, budget=BUDGET)
        found = answer(self._model, self._inputs, cache)
        kept = {index: cache.kept_indices(index) for index in range(len(cache.layers))}
        wrong = [index for index, each in kept.items() if each is not None and each.shape[-1] != BUDGET]
        if wrong or all(each is None for each in kept.values()):
            return f"layers {wrong} keep another number of tokens than the budget"
        valid = self._inputs["attention_mask"].bool()
        with dropped_entries_masked(self._model, kept, valid):
            masked = answer(self._model, self._inputs, DynamicCache(config=self._model.config))
        if difference(masked, self._expected) is None:
            return "not checked: the masks of the reference have no effect"
        return PASSED if is_close(found, masked) else str(difference(found, masked))

    def left_padding(self) -> str:
        """In a left-padded batch each row is as alone."""
        rows = [self._inputs, self._second]
        batch = left_padded(rows)

        def differs(make: Callable[[], Any]) -> str | None:
            together = answer(self._model, batch, make())
            for index, row in enumerate(rows):
                alone = answer(self._model, row, make())
                mine = Answer(together.tokens[index : index + 1], together.logits[index : index + 1])
                if not is_close(mine, alone):
                    return f"row {index}: {difference(mine, alone)}"
            return None

        found = differs(lambda: ShiftKVCache(self._model, budget=BUDGET))
        if found is not None and differs(lambda: DynamicCache(config=self._model.config)) is not None:
            return "not checked: with DynamicCache too rows differ from each alone"
        return found or PASSED

    def fixed_storage(self) -> str:
        """With max_new_tokens the answer is the same; says whether decoding compiles, or why not."""
        growing = answer(self._model, self._inputs, ShiftKVCache(self._model, budget=BUDGET))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = ShiftKVCache(self._model, budget=BUDGET, max_new_tokens=NEW_TOKENS)
        obstacle = next((str(each.message) for each in caught if "reserves nothing" in str(each.message)), None)
        found = answer(self._model, self._inputs, cache)
        if not is_close(found, growing):
            return str(difference(found, growing))
        if obstacle is not None:
            return "grows: " + obstacle.rpartition("not compiled: ")[2]
        return "compiled" if cache.is_compileable else "grows: no warning was given"


def _guarded(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
