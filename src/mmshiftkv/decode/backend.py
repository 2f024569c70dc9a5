"""A backend of torch.compile for decoding: the weights of projections are read at the speed of memory."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from shiftkv_kernels import MOST_ROWS, project_token

from .tracing import writes


def decoding_backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compiles a decoding step as `generate` does by itself (Inductor, CUDA graphs), with faster linear layers.

    With few rows in the batch a decoding step is hardly more than reading all weights.  Up to 16 rows, linear layers
    that share their input, as those of queries, keys and values do, become one launch of a kernel that reads their
    weights once, faster than several small matrix products do.  Sums are float32, rounded once.  Steps of more rows,
    and layers whose weights are quantized or spread over devices, stay as they are.

    `decode_ahead` takes it by itself; plain `generate` takes it as
    `compile_config=CompileConfig(backend=decoding_backend, mode=None)`.

    Args:
        graph_module: what Dynamo traced; it is changed.
        example_inputs: its inputs.

    Returns:
        The compiled step.
    """
    merge_projections(graph_module.graph)
    graph_module.recompile()
    return torch._inductor.compile(graph_module, example_inputs, options={"triton.cudagraphs": True})


def merge_projections(graph: fx.Graph) -> None:
    """Has the linear layers of one token of each row that share their input made by one `project_token`.

    Left alone are more than 16 rows, and what `project_token` does not take.

    Args:
        graph: as Dynamo hands it to a backend: parameters are placeholders, and nodes know their values' shapes.
    """
    groups: dict[tuple[Any, int], list[fx.Node]] = {}
    written = 0
    for node in graph.nodes:
        if writes(node):
            written += 1
        elif _is_projection(node):
            groups.setdefault((node.args[0], written), []).append(node)
    for nodes in groups.values():
        _merge(graph, nodes)


def _is_projection(node: fx.Node) -> bool:
    """Whether the node is a linear layer of a few rows' states, with weights as they are stored."""
    if node.op != "call_function" or node.target is not torch.nn.functional.linear or node.kwargs:
        return False
    state, *parameters = (part for part in node.args if isinstance(part, fx.Node))
    if any(part.op != "placeholder" for part in parameters):
        return False
    values: list[Any] = [part.meta.get("example_value") for part in (state, *parameters, node)]
    # Quantized and distributed weights are subclasses of their own.
    if any(type(value) is not FakeTensor for value in values):
        return False
    rows = math.prod(values[0].shape[:-1])
    # Sizes may be symbols: what is asked of them here holds for what is compiled.
    if values[1].dim() != 2 or not 1 <= rows <= MOST_ROWS:
        return False
    # `project_token` has no gradient.  Under autocast the dtypes differ.
    return not values[-1].requires_grad and all(
        value.dtype == values[0].dtype and value.is_contiguous() for value in values
    )


def _merge(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    states, weights, biases = zip(*((*node.args, None)[:3] for node in nodes), strict=True)
    with graph.inserting_before(nodes[0]):
        outputs = graph.call_function(
            torch.ops.mmshiftkv.project_token.default, (states[0], list(weights), list(biases))
        )
        parts = [graph.call_function(operator.getitem, (outputs, index)) for index in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part, propagate_meta=True)
        graph.erase_node(node)


@torch.library.custom_op("mmshiftkv::project_token", mutates_args=())
def _project_token(
    state: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]
) -> list[torch.Tensor]:
    return project_token(state, weights, biases)


@_project_token.register_fake
def _project_fake_token(
    state: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]
) -> list[torch.Tensor]:
    return [state.new_empty((*state.shape[:-1], weight.shape[0])) for weight in weights]
