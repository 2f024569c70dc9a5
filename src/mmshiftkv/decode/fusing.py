"""What stands around the linear layers of a traced graph that their launch can do as well: norms, gates, residuals."""

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import fx
from torch._subclasses import FakeTensor

# A root mean square norm as transformers' Llama writes it: from its end on, what each node calls, and the place of the
# argument that is the next node.  The last one's is the state.
_NORM = (
    (operator.mul, 1),
    ("to", 0),
    (operator.mul, 1),
    (torch.rsqrt, 0),
    (operator.add, 0),
    ("mean", 0),
    ("pow", 0),
    ("to", 0),
)
_NORMED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """The norm that makes the input of some layers, and nothing else."""

    state: fx.Node
    weight: fx.Node
    eps: float
    nodes: tuple[fx.Node, ...]  # each before those that it uses


class Gate(NamedTuple):
    """Two layers, one of which is the gate of the other."""

    layers: list[fx.Node]  # the gate first
    activated: fx.Node
    product: fx.Node


class Residual(NamedTuple):
    """What is added to the output of a layer."""

    state: fx.Node
    total: fx.Node


def norm_before(layers: Sequence[fx.Node], written: Mapping[fx.Node, int]) -> Norm | None:
    """The norm of the input that some layers share, if it has no other users.

    Args:
        layers: their nodes, all that share the input.
        written: how many nodes before each one write in place.
    """
    nodes: list[fx.Node] = []
    state = layers[0].args[0]
    for target, place in _NORM:
        if not isinstance(state, fx.Node) or state.target != target or len(state.args) <= place:
            return None
        nodes.append(state)
        state = state.args[place]
    (weight, *_), (_, eps) = nodes[0].args, nodes[4].args
    if not isinstance(state, fx.Node) or not isinstance(weight, fx.Node) or not isinstance(eps, float):
        return None
    if not _is_plain_norm(nodes, state, eps) or set(nodes[0].users) != set(layers):
        return None
    # The state is now read where the layers are.
    if written[nodes[-1]] != written[layers[0]] or not _fits_norm(state, weight, layers[0]):
        return None
    return Norm(state, weight, eps, tuple(nodes))


def _is_plain_norm(nodes: Sequence[fx.Node], state: fx.Node, eps: float) -> bool:
    """Whether the nodes of a norm have the arguments of one, and no users besides each other."""
    output, rounded, normed, scale, added, variance, squares, wide = nodes
    arguments = {
        rounded: (normed, _value(state).dtype),
        normed: (wide, scale),
        scale: (added,),
        added: (variance, eps),
        variance: (squares, -1),
        squares: (wide, 2),
        wide: (state, torch.float32),
    }
    if any(node.args != expected for node, expected in arguments.items()) or len(output.args) != 2:
        return False
    if any(node.kwargs != ({"keepdim": True} if node is variance else {}) for node in nodes):
        return False
    return set(wide.users) == {squares, normed} and all(len(node.users) == 1 for node in nodes[1:-1])


def _fits_norm(state: fx.Node, weight: fx.Node, layer: fx.Node) -> bool:
    """Whether the state and the weight of a norm are such as `project_token` takes with this layer."""
    parts = [_value(node) for node in (state, weight, layer)]
    if weight.op != "placeholder" or any(type(part) is not FakeTensor for part in parts):
        return False
    dtypes = {part.dtype for part in parts}
    if len(dtypes) != 1 or not dtypes < {*_NORMED_DTYPES} or not all(part.is_contiguous() for part in parts):
        return False
    return parts[1].shape == parts[0].shape[-1:]


def gate_behind(layers: Sequence[fx.Node]) -> Gate | None:
    """SiLU of one of two layers times the other, if nothing else uses them.

    Args:
        layers: their nodes, all that share the input.
    """
    if len(layers) != 2 or _value(layers[0]).shape != _value(layers[1]).shape:
        return None
    for gate, other in (layers, layers[::-1]):
        activated, product = _only_user(gate), _only_user(other)
        if activated is None or product is None or _only_user(activated) is not product:
            continue
        is_silu = activated.target is torch.nn.functional.silu and activated.args == (gate,)
        if not is_silu or any(activated.kwargs.values()):
            continue
        if product.target is operator.mul and product.args in ((activated, other), (other, activated)):
            return Gate([gate, other], activated, product)
    return None


def residual_behind(layers: Sequence[fx.Node], written: Mapping[fx.Node, int]) -> Residual | None:
    """What is added to the output of the only layer of its input, if nothing else uses that output.

    Args:
        layers: the nodes of all that share the input.
        written: how many nodes before each one write in place.
    """
    layer, total = layers[0], _only_user(layers[0])
    # The layer moves to the sum, where the residual is known.
    if len(layers) != 1 or total is None or total.target is not operator.add or written[total] != written[layer]:
        return None
    residuals = [part for part in total.args if part is not layer]
    if len(residuals) != 1 or not isinstance(residuals[0], fx.Node):
        return None
    state, output = _value(residuals[0]), _value(layer)
    if type(state) is not FakeTensor or state.dtype != output.dtype or not state.is_contiguous():
        return None
    return Residual(residuals[0], total) if state.shape == output.shape else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _value(node: fx.Node) -> torch.Tensor:
    return node.meta["example_value"]
