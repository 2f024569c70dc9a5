"""A backend of torch.compile for decoding: the weights of projections are read at the speed of memory."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from shiftkv_kernels import MOST_ROWS, project_gate, project_token

from .fusing import gate_behind, norm_before, residual_behind
from .tracing import writes


def decoding_backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compiles a decoding step as `generate` does by itself (Inductor, CUDA graphs), with faster linear layers.

    With few rows in the batch a decoding step is hardly more than reading all weights.  Up to 16 rows, linear layers
    that share their input, as those of queries, keys and values do, become one launch of a kernel that reads their
    weights once, faster than several small matrix products do.  With one row it makes what stands next to them too:
    norms as Llama's in front, the product with a SiLU gate, and the sum with a residual.  Sums are float32, rounded
    once.  Steps of more rows, and layers whose weights are quantized or spread over devices, stay as they are.

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
    """Has the linear layers of one token of each row that share their input made by one launch.

    With one row a norm of that input, the product with a gate and the sum with a residual are made in it too, where
    nothing else uses what they are made of.  Left alone are more than 16 rows, and what `project_token` does not take.

    Args:
        graph: as Dynamo hands it to a backend: parameters are placeholders, and nodes know their values' shapes.
    """
    groups: dict[tuple[Any, int], list[fx.Node]] = {}
    written: dict[fx.Node, int] = {}
    count = 0
    for node in graph.nodes:
        is_write = writes(node)
        count += is_write
        written[node] = count
        if not is_write and _is_projection(node):
            groups.setdefault((node.args[0], count), []).append(node)
    for layers in groups.values():
        _merge(graph, layers, written)


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
    rows = _rows_of(node)
    # Sizes may be symbols: what is asked of them here holds for what is compiled.
    if values[1].dim() != 2 or not 1 <= rows <= MOST_ROWS:
        return False
    # `project_token` has no gradient.  Under autocast the dtypes differ.
    return not values[-1].requires_grad and all(
        value.dtype == values[0].dtype and value.is_contiguous() for value in values
    )


def _rows_of(layer: fx.Node) -> int:
    return math.prod(layer.meta["example_value"].shape[:-1])


def _merge(graph: fx.Graph, layers: list[fx.Node], written: dict[fx.Node, int]) -> None:
    norm = gate = residual = None
    # With several rows, which matrix units multiply, a step took longer so.
    if _rows_of(layers[0]) == 1:
        norm, gate, residual = norm_before(layers, written), gate_behind(layers), residual_behind(layers, written)
    ordered = layers if gate is None else gate.layers
    states, weights, biases = zip(*((*node.args, None)[:3] for node in ordered), strict=True)
    state, *normed = (states[0], None, 0.0) if norm is None else (norm.state, norm.weight, norm.eps)
    given = (state, list(weights), list(biases), *normed)
    with graph.inserting_before(layers[0] if residual is None else residual.total):
        if gate is None:
            added = None if residual is None else residual.state
            outputs = graph.call_function(torch.ops.mmshiftkv.project_token.default, (*given, added))
            parts = [graph.call_function(operator.getitem, (outputs, index)) for index in range(len(layers))]
        else:
            parts = [graph.call_function(torch.ops.mmshiftkv.project_gate.default, given)]
    replaced = [gate.product] if gate else [residual.total] if residual else layers
    for node, part in zip(replaced, parts, strict=True):
        node.replace_all_uses_with(part, propagate_meta=True)
    # Each before those that it uses.
    behind, before = [gate.activated] if gate else [], norm.nodes if norm else ()
    for node in dict.fromkeys((*replaced, *behind, *layers, *before)):
        graph.erase_node(node)


def _norm(weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, float] | None:
    return None if weight is None else (weight, eps)


@torch.library.custom_op("mmshiftkv::project_token", mutates_args=())
def _project_token(
    state: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    residual: torch.Tensor | None,
) -> list[torch.Tensor]:
    return project_token(state, weights, biases, _norm(norm_weight, norm_eps), residual)


@_project_token.register_fake
def _project_fake_token(state: torch.Tensor, weights: list[torch.Tensor], *_: Any) -> list[torch.Tensor]:
    return [state.new_empty((*state.shape[:-1], weight.shape[0])) for weight in weights]


@torch.library.custom_op("mmshiftkv::project_gate", mutates_args=())
def _project_gate(
    state: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    return project_gate(state, weights, biases, _norm(norm_weight, norm_eps))


@_project_gate.register_fake
def _project_fake_gate(state: torch.Tensor, weights: list[torch.Tensor], *_: Any) -> torch.Tensor:
    return state.new_empty((*state.shape[:-1], weights[0].shape[0]))
