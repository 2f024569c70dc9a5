"""Attention of one token in a traced graph: a kernel that reads no hidden slot, and repeats no heads in memory."""

import operator

import torch
from torch import fx
from torch._subclasses import FakeTensor

from shiftkv_kernels import MOST_ROWS, attend_token

from .tracing import writes

# Beyond these, attention kernels for many queries split their work better.
_MOST_SLOTS, _LARGEST_HEAD_DIM = 1024, 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EVERYTHING = slice(None)
_WITH_GROUPS = (_EVERYTHING, _EVERYTHING, None, _EVERYTHING, _EVERYTHING)
_OPTIONS = {"attn_mask", "dropout_p", "scale", "is_causal", "enable_gqa"}


def replace_token_attention(graph: fx.Graph) -> None:
    """Has the attention of single tokens computed by `attend_token`.

    Left alone are dropout, masks of other shapes than one for all heads, many rows, many slots, and other dtypes.

    Args:
        graph: as Dynamo hands it to a backend: nodes know their values' shapes.
    """
    written, count = {}, 0
    for node in [*graph.nodes]:
        count += writes(node)
        written[node] = count
        if node.target is torch.nn.functional.scaled_dot_product_attention and _is_simple(node):
            _replace(graph, node, written)


def _is_simple(node: fx.Node) -> bool:
    options = node.kwargs
    if len(node.args) != 3 or not set(options) <= _OPTIONS:
        return False
    scale = options.get("scale")
    return not options.get("dropout_p") and not options.get("is_causal") and isinstance(scale, float | None)


def _replace(graph: fx.Graph, node: fx.Node, written: dict[fx.Node, int]) -> None:
    query, *repeated = node.args
    mask = node.kwargs.get("attn_mask")
    assert isinstance(query, fx.Node)
    keys, values = (_unrepeated(part, written, written[node]) for part in repeated if isinstance(part, fx.Node))
    if not _fits(node, query, keys, values, mask):
        return
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = _value(query).shape[3] ** -0.5
    with graph.inserting_before(node):
        output = graph.call_function(torch.ops.mmshiftkv.attend_token.default, (query, keys, values, mask, scale))
    node.replace_all_uses_with(output, propagate_meta=True)
    graph.erase_node(node)
    for part in repeated:
        _erase_unused(graph, part)


def _unrepeated(node: fx.Node, written: dict[fx.Node, int], now: int) -> fx.Node:
    """Keys or values before each head was repeated for its group; the node itself where none was."""
    chain = [node]
    for kind, target in (("call_method", "reshape"), ("call_method", "expand"), ("call_function", operator.getitem)):
        last = chain[-1]
        if (last.op, last.target) != (kind, target) or not isinstance(last.args[0], fx.Node):
            return node
        chain.append(last.args[0])
    _, expanded, with_groups, source = chain
    sizes, groups = _shape(source), _shape(expanded)
    if with_groups.args[1] != _WITH_GROUPS or sizes is None or groups is None or len(groups) != 5:
        return node
    is_repeated = groups == (*sizes[:2], groups[2], *sizes[2:])
    # The repeated heads are a copy, which later writes would not have changed.
    if not is_repeated or _shape(node) != (sizes[0], sizes[1] * groups[2], *sizes[2:]) or written[node] != now:
        return node
    return source


def _fits(node: fx.Node, query: fx.Node, keys: fx.Node, values: fx.Node, mask: object) -> bool:
    parts = [_value(part) for part in (query, keys, values)]
    shapes = [_shape(part) for part in (query, keys, values)]
    if any(shape is None for shape in shapes) or _value(node).requires_grad:
        return False
    if any(part.dtype not in _DTYPES or part.dtype != parts[0].dtype or part.stride(3) != 1 for part in parts):
        return False
    (rows, heads, tokens, head_dim), held, of_values = (shape or () for shape in shapes)
    if tokens != 1 or rows > MOST_ROWS or held[2] > _MOST_SLOTS or max(head_dim, of_values[3]) > _LARGEST_HEAD_DIM:
        return False
    if held != (rows, held[1], held[2], head_dim) or of_values[:3] != held[:3] or heads % held[1]:
        return False
    if mask is None:
        return True
    if not isinstance(mask, fx.Node) or _shape(mask) not in [(1, 1, 1, held[2]), (rows, 1, 1, held[2])]:
        return False
    return _value(mask).dtype in (torch.bool, parts[0].dtype) and _value(mask).is_contiguous()


def _value(node: fx.Node) -> torch.Tensor:
    return node.meta["example_value"]


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    """Of four or five dimensions; None for anything else."""
    value = node.meta.get("example_value")
    return tuple(value.shape) if type(value) is FakeTensor and value.dim() in (4, 5) else None


def _erase_unused(graph: fx.Graph, node: object) -> None:
    while isinstance(node, fx.Node) and node.op != "placeholder" and not node.users and not writes(node):
        source = node.args[0] if node.args else None
        graph.erase_node(node)
        node = source


@torch.library.custom_op("mmshiftkv::attend_token", mutates_args=())
def _attend_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return attend_token(query, keys, values, mask, scale)


@_attend_token.register_fake
def _attend_fake_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], values.shape[3]))
