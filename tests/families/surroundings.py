"""What a cache must leave as it was: a model's hooks, attributes and settings, and what transformers has registered."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def seen_around(model: PreTrainedModel) -> dict[str, Any]:
    """All of it, by what it is."""
    modules = dict(model.named_modules())
    return {
        "hooks": {name: [len(getattr(module, kind)) for kind in _HOOKS] for name, module in modules.items()},
        "attributes of modules": {name: _attributes(module) for name, module in modules.items()},
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "mask functions": sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
        "attention implementation": {
            name: module.config._attn_implementation for name, module in modules.items() if hasattr(module, "config")
        },
    }


def _attributes(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, plain) else type(value) for name, value in vars(module).items()}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of it has changed."""
    return [what for what in before if before[what] != after[what]]
