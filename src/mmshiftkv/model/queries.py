"""How a decoder layer makes its queries, rebuilt from its projection, query norm and rotary embedding."""

import contextlib
import copy
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shiftkv_kernels import rotate_queries

from .arguments import CACHE_ARGUMENTS

# What an attention module may have that changes its logits in a way the proxies' logits would miss.
_FOREIGN_PARTS = {
    "sink_proj": "attention sinks made of each token's state",
    "lambda_q1": "differential attention",
}
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # others are those of quantised weights
# Modules that passed `AttentionLayer.check`, and whether their rotary embedding pairs the halves of a head.
_checked: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()
# What `AttentionLayer._step_factors` made of a rotary embedding: layers and caches of a model share it.
_known_steps: "weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[torch.Tensor, torch.Tensor]]]" = (
    weakref.WeakKeyDictionary()
)


class AttentionLayer:
    """One attention module of a text decoder, as the maker of its queries.

    It belongs to the model, not to a cache: a deep copy of it is itself.

    Raises:
        ValueError: the module lacks a part, or has one that the method does not know; the message names it.
    """

    def __init__(self, module: nn.Module, index: int, rotary: nn.Module, layer_type: str | None) -> None:
        self.module = module
        self.index = index
        self.scaling: float = self._part("scaling")
        self.head_dim: int = self._part("head_dim")
        self._part("q_proj")
        self._part("k_proj")
        self._rotate = _rotation_function(module, self._name)
        self._rotary = rotary
        self._layer_type = layer_type
        self._pairs_halves = False
        for name, reason in _FOREIGN_PARTS.items():
            if getattr(module, name, None) is not None:
                raise ValueError(f"{self._name} is not supported: it has {reason} ({name})")

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionLayer":
        return self

    @property
    def _name(self) -> str:
        return f"model: layer {self.index} ({type(self.module).__name__})"

    def _part(self, name: str) -> Any:
        if not hasattr(self.module, name):
            raise ValueError(f"{self._name} is not supported: it has no attribute {name!r}")
        return getattr(self.module, name)

    @property
    def softcap(self) -> float | None:
        """What caps the logits: x becomes softcap * tanh(x / softcap); None: nothing does."""
        return getattr(self.module, "attn_logit_softcapping", None)

    @property
    def sinks(self) -> torch.Tensor | None:
        """Learned sinks, (H,): a logit of each query head that takes mass and gives nothing; None: there are none."""
        sinks = getattr(self.module, "sinks", None)
        return None if sinks is None else sinks.detach()

    def project_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Queries before rotation, (B, H, n, D), of attention inputs (B, n, d): projection, bias and query norm."""
        return self._project("q", hidden_states)

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotates (B, H, n, D) by cos and sin, (B or 1, n, rotary dim), as the model itself does."""
        if not getattr(self.module, "use_rope", True):
            return states
        return self._rotate(states, states, cos, sin)[0]

    def advance(
        self, cos: torch.Tensor, sin: torch.Tensor, *, count: int, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary factors at `count` later positions, `stride` apart, after the position of cos and sin.

        All axes of a multimodal rotary embedding advance together, as they do for text.

        Args:
            cos, sin: (B or 1, 1, rotary dim), of one position.

        Returns:
            cos and sin, (B or 1, count, rotary dim), of the same dtype.
        """
        step_cos, step_sin = self._step_factors(count, stride, cos.device)
        wide_cos, wide_sin = cos.float(), sin.float()
        later_cos = wide_cos * step_cos - wide_sin * step_sin
        later_sin = wide_sin * step_cos + wide_cos * step_sin
        return later_cos.to(cos.dtype), later_sin.to(sin.dtype)

    def rotate_ahead(
        self,
        proxies: torch.Tensor,
        last_query: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        count: int,
        stride: int,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotates proxies to `count` positions after a token, over and over, and the token's own query to its own.

        Args:
            proxies: (B, H, N, D), N a multiple of `count`.
            last_query: (B, H, 1, D).
            cos, sin: (B or 1, 1, rotary dim), of the token.
            stride: distance between the positions.
            backend: "auto", "triton" or "torch".
        """
        if not getattr(self.module, "use_rope", True):
            return proxies, last_query
        if self._pairs_halves:
            step_cos, step_sin = self._step_factors(count, stride, cos.device)
            return rotate_queries(proxies, last_query, cos, sin, step_cos[0], step_sin[0], backend=backend)
        later = self.advance(cos, sin, count=count, stride=stride)
        # All groups take the same positions, so they may pass for more heads.
        groups = proxies.unflatten(2, (-1, count)).flatten(1, 2)
        rotated = self.rotate(groups, *later).unflatten(1, (proxies.shape[1], -1)).flatten(2, 3)
        return rotated, self.rotate(last_query, cos, sin)

    def _step_factors(self, count: int, stride: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the angles between a position and the `count` next ones, (1, count, rotary dim) float32."""
        known = _known_steps.setdefault(self._rotary, {})
        # A model that is converted or moved gets other buffers.
        buffers = tuple((buffer.data_ptr(), buffer.dtype) for buffer in self._rotary.buffers())
        key = (self._layer_type, count, stride, device, buffers)
        if key not in known:
            positions = torch.arange(count + 1, device=device)[None] * stride
            cos, sin = rotary_factors(self._rotary, positions, self._layer_type)
            # Some embeddings scale cos and sin to scale the logits; cos at position 0 is that factor alone.
            scale = cos[:, :1]
            factors = cos[:, 1:] / scale, sin[:, 1:] / scale
            if not _is_static(self._rotary):
                return factors
            known[key] = factors
        return known[key]

    def _project(self, letter: str, hidden_states: torch.Tensor) -> torch.Tensor:
        projection = getattr(self.module, f"{letter}_proj")
        weight = getattr(projection, "weight", None)
        if weight is not None and weight.dtype in _PLAIN_DTYPES:
            hidden_states = hidden_states.to(weight.dtype)  # the model's own may be run under autocast
        projected = projection(hidden_states)
        norm = getattr(self.module, f"{letter}_norm", None) or getattr(self.module, f"{letter}_layernorm", None)
        weight = getattr(norm, "weight", None)
        # OLMo 2 and others norm all heads at once, Qwen 3 and others each head by itself.
        norm_is_joint = weight is not None and weight.ndim == 1 and weight.shape[0] == projected.shape[-1]
        if norm is not None and norm_is_joint:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        if norm is not None and not norm_is_joint:
            heads = norm(heads)
        return heads.transpose(1, 2)

    def check(self, hidden_size: int) -> None:
        """Runs two made-up tokens through the module and compares its keys with those rebuilt from its parts.

        Queries are made like keys in every decoder with a standard projection, so equal keys show that projection,
        norm and rotation are understood.  A module that passed once is not checked again.

        Raises:
            ValueError: they differ, or the module cannot be run like a standard attention module.
        """
        parameter = next(self.module.parameters())
        if parameter.device.type == "meta":
            return
        if self.module in _checked:
            self._pairs_halves = _checked[self.module]
            return
        dtype = parameter.dtype if parameter.dtype in _PLAIN_DTYPES else torch.get_default_dtype()
        hidden = torch.arange(2 * hidden_size, device=parameter.device).sin().view(1, 2, hidden_size).to(dtype)
        positions = torch.tensor([[3, 11]], device=parameter.device)
        try:
            with torch.no_grad(), without_autocast(parameter.device):
                cos, sin = (part.to(dtype) for part in rotary_factors(self._rotary, positions, self._layer_type))
                expected = _keys_of(self.module, hidden, cos, sin)
                unrotated = self._project("k", hidden)
                rebuilt = self.rotate(unrotated, cos, sin)
                queries = self.project_queries(hidden)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{self._name} is not supported: its keys could not be rebuilt ({error})") from error
        if expected.shape != rebuilt.shape or not torch.allclose(expected, rebuilt, rtol=0.05, atol=0.01):
            raise ValueError(
                f"{self._name} is not supported: its keys are not its k_proj, norm and apply_rotary_pos_emb in a row"
            )
        shared = getattr(self.module, "num_key_value_groups", queries.shape[1] // expected.shape[1])
        if queries.shape[1] != shared * expected.shape[1]:
            raise ValueError(
                f"{self._name} is not supported: q_proj gives {queries.shape[1]} heads of {self.head_dim}, not "
                f"num_key_value_groups={shared} for each of the {expected.shape[1]} KV heads"
            )
        last = slice(1, 2)
        self._pairs_halves = _pairs_halves(unrotated[:, :, last], cos[:, last], sin[:, last], rebuilt[:, :, last])
        _checked[self.module] = self._pairs_halves


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast on this device for a while: statistics and scores choose their dtypes themselves."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def rotary_factors(
    rotary: nn.Module, positions: torch.Tensor, layer_type: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (1, n, rotary dim) float32, of positions (1, n), with the frequencies now in use.

    The module itself is neither called nor changed: dynamic embeddings recompute their frequencies when called, which
    a look at a few positions must not cause.
    """
    still: Any = copy.copy(rotary)
    rope_type: Any = getattr(rotary, "rope_type", "default")
    still.rope_type = dict.fromkeys(rope_type, "default") if isinstance(rope_type, dict) else "default"
    device = next(rotary.buffers(), positions).device
    where = positions.to(device)
    if hasattr(rotary, "mrope_section"):
        where = where[None].expand(3, -1, -1)
    forward = type(rotary).forward
    arguments = (layer_type,) if "layer_type" in inspect.signature(forward).parameters else ()
    cos, sin = forward(still, torch.zeros(1, device=device), where, *arguments)
    return cos.to(positions.device), sin.to(positions.device)


def _pairs_halves(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotated: torch.Tensor) -> bool:
    """Whether (B, H, 1, D) states become `rotated` by pairing feature i with feature i + rotary dim / 2."""
    if cos.shape[-1] % 2 or cos.shape[-1] > states.shape[-1]:
        return False
    no_step = torch.ones_like(cos[0]).float(), torch.zeros_like(cos[0]).float()
    turned, _ = rotate_queries(states, states, cos, sin, *no_step, backend="torch")
    return torch.allclose(turned, rotated, rtol=0.05, atol=0.01)


def _is_static(rotary: nn.Module) -> bool:
    rope_type: Any = getattr(rotary, "rope_type", "default")
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return not any(kind == "longrope" or "dynamic" in kind for kind in kinds)


def _rotation_function(module: nn.Module, name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    function = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        raise ValueError(f"{name} is not supported: its module defines no apply_rotary_pos_emb")
    return function


class _KeysSeen(Exception):
    """Ends the attention module's forward pass once its keys are known."""


class _KeyRecorder:
    """Stands in for a cache and keeps what it is given."""

    keys: torch.Tensor

    def update(self, keys: torch.Tensor, *_: Any, **__: Any) -> None:
        self.keys = keys
        raise _KeysSeen


def _keys_of(module: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    recorder = _KeyRecorder()
    parameters = inspect.signature(module.forward).parameters
    name = next((name for name in CACHE_ARGUMENTS if name in parameters), CACHE_ARGUMENTS[-1])
    try:
        module(hidden_states=hidden, position_embeddings=(cos, sin), attention_mask=None, **{name: recorder})
    except _KeysSeen:
        return recorder.keys
    raise RuntimeError("it does not pass its keys to the cache's update")
