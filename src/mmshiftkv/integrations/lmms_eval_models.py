"""lmms-eval's Qwen2.5-VL and LLaVA, answering with a compressed cache; everything else is as lmms-eval does it."""

import inspect
from typing import Any

import torch

from ..checks import check_budget, check_choice
from ..model.arguments import CACHE_ARGUMENT
from ..registry import CACHES, make_cache
from .lmms_eval import missing

try:
    from accelerate import PartialState
    from lmms_eval.api.model import lmms
    from lmms_eval.models.chat.llava_hf import LlavaHf
    from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
except ModuleNotFoundError as error:
    raise missing(error) from error


class _Generator:
    """A model whose `generate` gets a new cache in every call; all else is the model's own."""

    def __init__(self, model: Any, method: str, budget: int | float | None, settings: dict[str, Any]) -> None:
        self._model = model
        self._cache = (method, model, budget)
        self._settings = settings
        self.failure: Exception | None = None
        make_cache(*self._cache, **settings)  # a bad setting or model shows now, not after the data is prepared

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; after a failure every later call fails as well."""
        if self.failure is not None:
            raise self.failure
        try:
            cache = make_cache(*self._cache, **self._settings)
            return self._model.generate(*args, **{CACHE_ARGUMENT: cache}, **kwargs)
        except Exception as error:
            self.failure = error
            raise


class CompressedCacheModel(lmms):
    """What the models with a compressed cache have in common; comes before lmms-eval's class among the bases.

    Args:
        method: one of `mmshiftkv.METHODS`; "full" is the cache without compression.
        budget: tokens kept per KV head and layer (int), or a share of the prompt (float); not needed with "full".
        arguments: what lmms-eval's class takes, and settings of the method's cache, such as `gamma` or `window`.

    Raises:
        TypeError, ValueError: an unknown method (the message lists those there are) or setting, no budget, a value that
            the cache refuses, `use_cache=False`, or a model that is not supported.
    """

    def __init__(self, method: str = "shiftkv", budget: int | float | None = None, **arguments: Any) -> None:
        check_choice("method", method, ("full", *CACHES))
        if method != "full":
            check_budget(budget)
        if not arguments.get("use_cache", True):
            raise ValueError("use_cache=False: there is no cache to compress then; leave it out")
        known = inspect.signature(super().__init__).parameters
        settings = {name: arguments.pop(name) for name in list(arguments) if name not in known}
        self._generator: _Generator | None = None
        super().__init__(**arguments)
        self._generator = _Generator(super().model, method, budget, settings)

    @property
    def model(self) -> Any:
        """The model without what accelerate wraps around it; with its cache once it is loaded."""
        return super().model if self._generator is None else self._generator

    def loglikelihood(self, requests: Any) -> Any:
        """Not there: NotImplementedError, since no token would be decoded on the compressed cache."""
        raise NotImplementedError("loglikelihood decodes nothing, so a compressed cache changes nothing in it")

    def generate_until(self, requests: Any) -> Any:
        """The answers.

        Raises:
            RuntimeError: the model failed at one of them.  lmms-eval's LLaVA goes on with an empty answer then, and a
                crash would look like a method that does badly.
        """
        answers = super().generate_until(requests)
        if self._generator is not None and self._generator.failure is not None:
            raise RuntimeError(f"generate failed: {self._generator.failure}") from self._generator.failure
        return answers


class Qwen2_5_VLShiftKV(CompressedCacheModel, Qwen2_5_VL):
    """lmms-eval's Qwen2.5-VL with a compressed cache; arguments as in `CompressedCacheModel`."""

    def __init__(self, **arguments: Any) -> None:
        device = arguments.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        if torch.device(device).type != "cuda":
            # With its default, "auto", lmms-eval's class sends its inputs to a GPU wherever the model is.
            arguments.setdefault("device_map", device)
        super().__init__(**arguments)


class LlavaHfShiftKV(CompressedCacheModel, LlavaHf):
    """lmms-eval's LLaVA with a compressed cache; arguments as in `CompressedCacheModel`."""

    def __init__(self, **arguments: Any) -> None:
        device = arguments.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        if PartialState().num_processes == 1 or torch.device(device).type != "cuda":
            # Its default, "", is refused by transformers 5.  With several processes, "" means a GPU for each of them.
            arguments.setdefault("device_map", device)
        super().__init__(**arguments)
