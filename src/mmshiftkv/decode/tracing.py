"""What a node of a traced graph does."""

import operator
import types
from typing import Any

import torch
from torch import fx


def writes(node: fx.Node) -> bool:
    """Whether the node may change a tensor in place: what is merged moves forward, and must not pass it."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    return _is_opaque(target) or _is_in_place(target, node)


def _is_opaque(target: Any) -> bool:
    """Whether nothing is known of what the function does: Dynamo did not look into it, or it calls others."""
    if isinstance(target, types.FunctionType):
        return not target.__module__.startswith("torch.")
    return isinstance(target, torch._ops.HigherOrderOperator)


def _is_in_place(target: Any, node: fx.Node) -> bool:
    """Whether a function or method of torch, or an operator, writes, by its name or its arguments."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "_")
    name = name.removeprefix("__").removesuffix("__")
    writes = name.endswith("_") or name == "setitem" or (name.startswith("i") and hasattr(operator, f"__{name}__"))
    # Those of torch.nn.functional take `inplace` and `training` as keywords or by place.
    given = (*node.args, *(node.kwargs.get(keyword) for keyword in ("inplace", "training")))
    return writes or "out" in node.kwargs or any(part is True for part in given)
