"""Half precision against the masked full cache in float32."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

import models
from mmshiftkv import make_cache

from .bench import Bench, Prompts, TextModel, draw_budget, draw_score, tokens_kept
from .case import Case, Draws, Outcome
from .checks import check_kept, check_lengths, kept_by_layer, masked_logits, run_pass
from .methods import draw_method, protected


@dataclass(frozen=True)
class HalfPrecision(Case):
    """Logits in half precision are as near to float32 as those of the masked full cache in half precision.

    Attributes:
        method: the name of the cache's method.
        settings: of the method.
        tokens: fed behind the prompt, at once and one by one in turn.
        room: `max_new_tokens` of the cache.
    """

    model: TextModel
    prompts: Prompts
    method: str
    settings: tuple[tuple[str, Any], ...]
    budget: int | float
    tokens: int
    room: int | None

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model = TextModel.draw(draws, dtype=draws.one_of("bfloat16", "float16"))
        prompts, budget = Prompts.draw(draws), 0
        method, settings = draws.one_of(("shiftkv", draw_score(draws, refit=False)), draw_method(draws))
        least = protected(method, dict(settings)) if method != "shiftkv" else 1
        while budget < least and not isinstance(budget, float):
            budget = draw_budget(draws, prompts.width + least)
        room = draws.one_of(None, draws.randint(1, 10))
        return cls(model, prompts, method, settings, budget, draws.randint(1, 8), room)

    def run(self, bench: Bench) -> Outcome:
        model, exact = bench.text(self.model), bench.text(replace(self.model, dtype="float32"))
        inputs = self.prompts.inputs(bench.device)
        cache = make_cache(self.method, model, self.budget, max_new_tokens=self.room, **dict(self.settings))
        tokens = models.prompt_ids(len(self.prompts.lengths), self.tokens, seed=1).to(bench.device)
        mask = inputs["attention_mask"]
        run_pass(model, cache, inputs["input_ids"], mask)
        check_kept(cache, mask, self.budget)
        found = self._steps(model, cache, tokens, mask)
        width = self.prompts.width
        check_lengths(cache, width + self.tokens, tokens_kept(self.budget, width) + self.tokens)
        pieces, kept = [inputs["input_ids"], tokens], kept_by_layer(cache)
        expected = masked_logits(exact, pieces, mask, kept)[1]
        same_dtype = masked_logits(model, pieces, mask, kept)[1]
        self._check_error(found, same_dtype, expected)
        return Outcome.PASSED

    def _steps(self, model: Any, cache: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = []
        for token in tokens.split(1, dim=1):
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            logits.append(run_pass(model, cache, token, mask))
        return torch.cat(logits, dim=1)

    def _check_error(self, found: torch.Tensor, same_dtype: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.isfinite().all(), "not all logits are finite"
        size = expected.norm().item()
        error, own = ((part.float() - expected).norm().item() / size for part in (found, same_dtype))
        allowed = 3 * own + 8 * torch.finfo(found.dtype).eps
        assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}, the full cache has {own:.3g}"
