"""Pays for the first answer before anybody waits for it."""

import logging
import time
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache import PrefillSelectionCache
from ..checks import check_integer
from ..decode.loop import decode_ahead
from ..model.arguments import CACHE_ARGUMENT
from ..registry import make_cache
from .positions import offsets_of, put_back

# The first step compiles, the second is recorded, the third is the first that is only replayed.
_STEPS = 3
_LEAST_PROMPT = 64
_logger = logging.getLogger(__name__)


@torch.no_grad()
def warm_up(
    model: PreTrainedModel,
    budget: int | float,
    max_new_tokens: int,
    *,
    method: str = "shiftkv",
    batch_size: int = 1,
    prompt_tokens: int | None = None,
    **settings: Any,
) -> None:
    """Has all compiled and recorded that `decode_ahead` needs with caches of these settings: for servers.

    It answers a made-up prompt of text; of that nothing stays.  Call it once for each set of settings and each batch
    size, before the first user comes, in any thread in which nothing else is running the model.

    Args:
        model: the model.
        budget: as the cache's.  With a share, prompts of another length than `prompt_tokens` are recorded anew.
        max_new_tokens: as the cache's, whose storage it sizes.
        method: one of `METHODS`, as in `make_cache`, or one registered since.
        batch_size: rows of the batches to come.
        prompt_tokens: columns of the made-up prompt; None: as many as a selection from it needs, twice the budget.
        settings: what the method's cache takes besides, such as `preset`.

    Raises:
        TypeError, ValueError: a setting that the cache refuses, or the model's decoding cannot be compiled.
    """
    check_integer("batch_size", batch_size, minimum=1)
    if prompt_tokens is None:
        prompt_tokens = max(2 * int(budget) if isinstance(budget, Integral) else 0, _LEAST_PROMPT)
    check_integer("prompt_tokens", prompt_tokens, minimum=1)
    cache = make_cache(method, model, budget, max_new_tokens=max_new_tokens, **settings)
    if not isinstance(cache, PrefillSelectionCache) or not cache.is_compileable:
        raise ValueError(f"model: decoding of {type(model).__name__} with method={method!r} cannot be compiled")
    started = time.monotonic()
    _logger.info("warming up %s: batches of %d", type(model).__name__, batch_size)
    ids = torch.full((batch_size, prompt_tokens), _plain_token(model), device=model.device)
    _answer(model, cache, ids, min(_STEPS, max_new_tokens) + 1)
    _logger.info("warmed up %s in %.1f s", type(model).__name__, time.monotonic() - started)


def _answer(model: PreTrainedModel, cache: PrefillSelectionCache, ids: torch.Tensor, tokens: int) -> None:
    offsets = offsets_of(model)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{CACHE_ARGUMENT: cache},
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                num_beams=1,
                do_sample=False,
                custom_generate=decode_ahead,
            )
        finally:
            put_back(model, offsets)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _plain_token(model: PreTrainedModel) -> int:
    """A token of text: none that stands for an image, or begins or ends something."""
    special: set[Any] = set()
    for config in (model.config, model.config.get_text_config(decoder=True), model.generation_config):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)
