"""One thread for each model, in which all its turns run.

A model has one state of its own (`rope_deltas`), so its turns must not run side by side; and CUDA graphs belong to the
thread that recorded them, so a turn that is streamed from a thread of its own would record them anew.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from transformers import PreTrainedModel

Result = TypeVar("Result")
_executors: "weakref.WeakKeyDictionary[Any, ThreadPoolExecutor]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def submit(model: PreTrainedModel, work: Callable[[], Result]) -> "Future[Result]":
    """Has `work` done in the model's thread, behind all that was submitted before."""
    with _lock:
        if model not in _executors:
            _executors[model] = ThreadPoolExecutor(1, thread_name_prefix="mmshiftkv")
        return _executors[model].submit(work)
