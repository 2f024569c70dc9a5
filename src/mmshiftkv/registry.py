"""The caches of all methods, and the registry that scripts find them in.

Settings and conventions are those of NVIDIA's kvpress (https://github.com/NVIDIA/kvpress) where the papers leave them
open, and the kept tokens agree with it (tests/methods/test_kvpress.py) but for these differences, which hold for all
methods:

- a budget is the number of tokens kept per KV head and layer, and the last token is always among them;
- padding on the left of a row is neither counted nor scored;
- logits, softmax and sums are float32, and logits are scaled as the model scales them;
- tokens that a method protects (StreamingLLM's and ExpectedAttention's sinks, SnapKV's window) get scores of their own
  above all others, not the highest of the batch plus one; a budget smaller than their number is refused, and a share
  of the prompt that comes out smaller keeps the first sinks, or the last tokens of the window.
"""

from dataclasses import asdict, fields, is_dataclass
from typing import Any, ClassVar, Self

from transformers import Cache, DynamicCache, PreTrainedModel

from .cache import PrefillSelectionCache
from .checks import check_choice
from .methods.base import Method
from .methods.config import ShiftKVConfig
from .methods.expected_attention import ExpectedAttention
from .methods.keydiff import KeyDiff
from .methods.random_tokens import Random
from .methods.shiftkv import ShiftKV
from .methods.snapkv import SnapKV
from .methods.streaming_llm import StreamingLLM
from .model.decoder import text_decoder
from .storage.held import HeldLayer


class ShiftKVCache(PrefillSelectionCache):
    """A KV cache that keeps the prompt tokens which MM-ShiftKV selects.

    `ShiftKVCache(model, budget=64)` takes the published settings of the model's family
    (`ShiftKVConfig.for_model`) with the given ones on top; `ShiftKVCache(model, config)` takes a config as it is.  Pass
    it to `model.generate` as `cache`, which transformers before 5.24 calls `past_key_values`.

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

    def _settings_to_save(self) -> dict[str, Any]:
        return asdict(self.config)

    def with_layers(self, held: dict[int, HeldLayer], max_new_tokens: int | None) -> Self:
        """As in `PrefillSelectionCache`."""
        twin = super().with_layers(held, max_new_tokens)
        twin.config = self.config.replace(max_new_tokens=max_new_tokens)
        return twin


class MethodCache(PrefillSelectionCache):
    """A cache with one of the methods whose settings are its fields: `SnapKVCache(model, budget=64, window=32)`.

    Args:
        model, budget, max_new_tokens, prefill, prompt_length, backend: as for `PrefillSelectionCache`.
        settings: fields of the method.

    Raises:
        TypeError, ValueError: as `PrefillSelectionCache`, or a setting that the method does not have.
    """

    method_type: ClassVar[type[Method]]

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
        allowed = settings_of(self.method_type)
        unknown = sorted(set(settings) - set(allowed))
        if unknown:
            name, settings_there_are = self.method_type.__name__, ", ".join(allowed) or "none"
            if any(setting.startswith("refit") for setting in unknown):
                raise TypeError(f"{', '.join(unknown)}: {name} has no refit; its settings: {settings_there_are}")
            raise TypeError(f"unknown setting {', '.join(unknown)}; {name} has {settings_there_are}")
        super().__init__(
            model,
            self.method_type(**settings),
            budget,
            max_new_tokens=max_new_tokens,
            prefill=prefill,
            prompt_length=prompt_length,
            backend=backend,
        )

    def _settings_to_save(self) -> dict[str, Any]:
        own = {name: getattr(self._method, name) for name in settings_of(self.method_type)}
        return {**super()._settings_to_save(), **own}


def settings_of(method_type: type[Method]) -> list[str]:
    """The names of a method's settings: its fields, if it is a dataclass."""
    return [field.name for field in fields(method_type)] if is_dataclass(method_type) else []


# In the order in which scripts name them.
CACHES: dict[str, type[PrefillSelectionCache]] = {"shiftkv": ShiftKVCache}


def register_method(name: str, method_type: type[Method]) -> type[MethodCache]:
    """Makes a method known to `make_cache` by its name.

    Returns:
        Its cache: `register_method("snapkv", SnapKV)` is `SnapKVCache`.

    Raises:
        TypeError: `method_type` is no class that inherits from `Method`.
        ValueError: the name is taken.
    """
    if not (isinstance(method_type, type) and issubclass(method_type, Method)):
        raise TypeError(f"method_type={method_type!r} must be a class that inherits from mmshiftkv.Method")
    known = getattr(CACHES.get(name), "method_type", None)
    # The same class once more is one that was written anew, in a notebook.
    if name == "full" or (name in CACHES and getattr(known, "__qualname__", None) != method_type.__qualname__):
        raise ValueError(f"name={name!r} is taken")
    settings = ", ".join(settings_of(method_type)) or "none"
    cache = type(
        f"{method_type.__name__}Cache",
        (MethodCache,),
        {
            "__doc__": f"A cache with the method {method_type.__name__}; its settings: {settings}.",
            "__module__": __name__,
            "method_type": method_type,
        },
    )
    CACHES[name] = cache
    return cache


RandomCache = register_method("random", Random)
StreamingLLMCache = register_method("streaming_llm", StreamingLLM)
ExpectedAttentionCache = register_method("expected_attention", ExpectedAttention)
SnapKVCache = register_method("snapkv", SnapKV)
KeyDiffCache = register_method("keydiff", KeyDiff)

METHODS = ("full", *CACHES)


def make_cache(name: str, model: PreTrainedModel, budget: int | float | None = None, **settings: Any) -> Cache:
    """A new cache by the name of its method, for scripts.

    Args:
        name: one of `METHODS`, or one registered since; "full" is `DynamicCache`, which takes no settings and looks at
            no budget.
        model: the model that the cache will be used with.
        budget: tokens kept per KV head and layer (int), or a share of the prompt (float).
        settings: what the method's cache takes besides.

    Raises:
        TypeError, ValueError: an unknown method (the message lists those there are) or setting, no budget, or a value
            that the cache refuses.
    """
    check_choice("method", name, ("full", *CACHES))
    if name == "full":
        if settings:
            raise TypeError(f"unknown setting {', '.join(settings)}; the full cache has none")
        return DynamicCache(config=model.config)
    if budget is None:
        raise TypeError("budget is missing: an int (tokens per KV head) or a float in (0, 1] (share of the prompt)")
    cache: Any = CACHES[name]
    return cache(model, budget=budget, **settings)
