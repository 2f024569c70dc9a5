"""One compiled function for all decoder blocks of a kind."""

import itertools
import logging
import time
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from .backend import merge_projections
from .token_attention import replace_token_attention

_logger = logging.getLogger(__name__)
_numbers = itertools.count()

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def block_backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: Inductor, with the kernels of this package for one token.

    Args:
        graph_module: one decoder block as Dynamo traced it; it is changed.
        example_inputs: its inputs.

    Returns:
        The compiled block.
    """
    started = time.monotonic()
    _logger.info("compiling a decoder block; blocks of the same kind share it")
    use_token_kernels(graph_module)
    # Rotating a query, rotating a key and writing it, and writing a value do not need each other: one launch.
    options = {"triton.cudagraphs": False, "combo_kernels": True}
    compiled = torch._inductor.compile(graph_module, example_inputs, options=options)
    _logger.info("compiled a decoder block in %.1f s", time.monotonic() - started)
    return compiled


def use_token_kernels(graph_module: fx.GraphModule) -> None:
    """Has projections and attention of single tokens done by the kernels of this package; the graph is changed."""
    merge_projections(graph_module.graph)
    replace_token_attention(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()


class BlockPrograms:
    """Compiled functions that run any block of a kind: each is compiled for the first block, and serves all others.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: Backend = block_backend) -> None:
        self._backend = backend
        self._programs: dict[Hashable, Callable[..., Any]] = {}

    def of_kind(self, kind: Hashable) -> Callable[..., Any]:
        """The function (block, *args, **kwargs) for blocks of that kind."""
        if kind not in self._programs:
            # What is compiled, how often, and which sizes have changed is kept by code object and by name: each kind
            # has its own, so that the sizes of one are not taken for changes in those of another.
            name = f"{_run_block.__name__}_{next(_numbers)}"
            function = FunctionType(_run_block.__code__.replace(co_name=name), globals(), name)
            self._programs[kind] = torch.compile(function, backend=self._backend, fullgraph=True)
        return self._programs[kind]


def _run_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)
