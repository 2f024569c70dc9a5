"""The caches of all methods, and the registry that scripts find them in.

Settings and conventions are those of NVIDIA's kvpress (https://github.com/NVIDIA/kvpress) where the papers leave them
open, and the kept tokens agree with it (tests/methods/test_kvpress.py) but for these differences, which hold for all
methods:

- a budget is the number of tokens kept per KV head and layer, and the last token is always among them;
- padding on the left of a row is neither counted nor scored;
- logits, softmax and sums are float32, and logits are scaled as the model scales them;
- tokens that a method protects get scores of their own above all others, not the highest of the batch plus one; a
  budget smaller than their number is refused, and a share of the prompt that comes out smaller keeps the first of the
  sinks and the last of the window.
"""

from dataclasses import fields
from numbers import Integral
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel

from .cache import PrefillSelectionCache
from .checks import check_choice
from .methods.config import ShiftKVConfig
from .methods.expected_attention import ExpectedAttention
from .methods.keydiff import KeyDiff
from .methods.random_tokens import Random
from .methods.shiftkv import ShiftKV
from .methods.snapkv import SnapKV
from .methods.streaming_llm import StreamingLLM
from .model.decoder import text_decoder


class ShiftKVCache(PrefillSelectionCache):
    """A KV cache that keeps the prompt tokens which MM-ShiftKV selects.

    `ShiftKVCache(model, budget=64)` takes the published settings of the model's family
    (`ShiftKVConfig.for_model`) with the given ones on top; `ShiftKVCache(model, config)` takes a config as it is.  Pass
    it as `past_key_values` to `model.generate`.

    Args:
        model: the model that the cache will be used with.
        config: all settings.
        settings: fields of `ShiftKVConfig`, at least `budget`, and `preset`; not together with `config`.

    Raises:
        TypeError: both or neither of config and settings, an unknown field, a value of the wrong type.
        ValueError: a value out of range, or a model that is not supported; the message says what is wrong.
    """

    def __init__(self, model: PreTrainedModel, config: ShiftKVConfig | None = None, **settings: Any) -> None:
        text_decoder(model)
        if config is None:
            config = ShiftKVConfig.for_model(model, **settings)
        elif settings:
            raise TypeError(f"config and {', '.join(settings)} were both given; use config.replace(...) instead")
        elif not isinstance(config, ShiftKVConfig):
            raise TypeError(f"config={config!r} must be a ShiftKVConfig; the budget is a keyword: budget=64")
        self.config = config
        super().__init__(
            model,
            ShiftKV(config),
            config.budget,
            max_new_tokens=config.max_new_tokens,
            prefill=config.prefill,
            prompt_length=config.prompt_length,
            backend=config.backend,
        )
        config.check_layers(len(self._decoder.blocks))


class _BaselineCache(PrefillSelectionCache):
    """What the caches of the baselines have in common: a method whose settings are keywords."""

    _method_type: Any

    def __init__(
        self,
        model: PreTrainedModel,
        budget: int | float,
        *,
        max_new_tokens: int | None = None,
        prefill: str = "single",
        prompt_length: int | None = None,
        backend: str = "auto",
        **settings: Any,
    ) -> None:
        allowed = [field.name for field in fields(self._method_type)]
        unknown = sorted(set(settings) - set(allowed))
        if unknown:
            raise TypeError(
                f"unknown setting {', '.join(unknown)}; {self._method_type.__name__} has {', '.join(allowed) or 'none'}"
            )
        method = self._method_type(**settings)
        super().__init__(
            model,
            method,
            budget,
            max_new_tokens=max_new_tokens,
            prefill=prefill,
            prompt_length=prompt_length,
            backend=backend,
        )
        if isinstance(budget, Integral) and int(budget) < method.protected:
            raise ValueError(
                f"budget={budget} must be at least {method.protected}: {method} always keeps so many tokens"
            )


class StreamingLLMCache(_BaselineCache):
    """Keeps attention sinks and recent tokens: `StreamingLLMCache(model, budget=64, sinks=4)`.

    Settings are the fields of `baselines.StreamingLLM`, everything else is as in `PrefillSelectionCache`.
    """

    _method_type = StreamingLLM


class SnapKVCache(_BaselineCache):
    """Keeps what the prompt's last queries attend to: `SnapKVCache(model, budget=64, window=32, kernel_size=5)`.

    Settings are the fields of `baselines.SnapKV`, everything else is as in `PrefillSelectionCache`.
    """

    _method_type = SnapKV


class KeyDiffCache(_BaselineCache):
    """Keeps the keys least like the mean key: `KeyDiffCache(model, budget=64)`; see `baselines.KeyDiff`.

    Everything else is as in `PrefillSelectionCache`.
    """

    _method_type = KeyDiff


class ExpectedAttentionCache(_BaselineCache):
    """Keeps what likely future queries attend to: `ExpectedAttentionCache(model, budget=64, sinks=4)`.

    Settings are the fields of `baselines.ExpectedAttention`, everything else is as in `PrefillSelectionCache`.
    """

    _method_type = ExpectedAttention


class RandomCache(_BaselineCache):
    """Keeps random tokens: `RandomCache(model, budget=64, seed=0)`; see `baselines.Random`.

    Everything else is as in `PrefillSelectionCache`.
    """

    _method_type = Random


BASELINES: dict[str, type[_BaselineCache]] = {
    "random": RandomCache,
    "streaming_llm": StreamingLLMCache,
    "expected_attention": ExpectedAttentionCache,
    "snapkv": SnapKVCache,
    "keydiff": KeyDiffCache,
}
METHODS = ("full", "shiftkv", *BASELINES)


def make_cache(name: str, model: PreTrainedModel, budget: int | float | None = None, **settings: Any) -> Cache:
    """A new cache by the name of its method, for scripts.

    Args:
        name: one of `METHODS`; "full" is `DynamicCache`, which takes no settings and looks at no budget.
        model: the model that the cache will be used with.
        budget: tokens kept per KV head and layer (int), or a share of the prompt (float).
        settings: what the method's cache takes besides.

    Raises:
        TypeError, ValueError: an unknown method (the message lists those there are) or setting, no budget, or a value
            that the cache refuses.
    """
    check_choice("method", name, METHODS)
    if name == "full":
        if settings:
            raise TypeError(f"unknown setting {', '.join(settings)}; the full cache has none")
        return DynamicCache(config=model.config)
    if budget is None:
        raise TypeError("budget is missing: an int (tokens per KV head) or a float in (0, 1] (share of the prompt)")
    if name == "shiftkv":
        return ShiftKVCache(model, budget=budget, **settings)
    return BASELINES[name](model, budget, **settings)
