"""One thread for each model, in which all its turns run.

A model has one state of its own (`rope_deltas`), so its turns must not run side by side; and CUDA graphs belong to the
thread that recorded them, so a turn that is streamed from a thread of its own would record them anew.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

Result = TypeVar("Result")
_executors: "weakref.WeakKeyDictionary[Any, ThreadPoolExecutor]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _prepare_for_graphs(device: torch.device) -> None:
    """Gives this thread what each has of its own: its current GPU, and what CUDA graphs of torch.compile keep.

    Some versions of torch do not do the latter by themselves (2.11).
    """
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    from torch._inductor.cudagraph_trees import local

    if not hasattr(local, "tree_manager_containers"):
        local.tree_manager_containers = {}
        local.tree_manager_locks = defaultdict(threading.Lock)


def submit(model: PreTrainedModel, work: Callable[[], Result]) -> "Future[Result]":
    """Has `work` done in the model's thread, behind all that was submitted before."""
    with _lock:
        if model not in _executors:
            _executors[model] = ThreadPoolExecutor(
                1, "mmshiftkv", initializer=_prepare_for_graphs, initargs=(model.device,)
            )
        return _executors[model].submit(work)
