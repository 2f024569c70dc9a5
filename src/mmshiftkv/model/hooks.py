"""What an attention layer sees during a prefill, and the hooks that show it to a cache."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from .arguments import CACHE_ARGUMENTS
from .decoder import Decoder
from .positions import Positions
from .queries import AttentionLayer

# Registering a hook is not atomic in torch, and caches of one model may live in several threads.  Reentrant, because
# a cache that dies while the lock is held takes its hooks off in the same thread.
_hook_lock = threading.RLock()
_attached: "weakref.WeakSet[PrefillHooks]" = weakref.WeakSet()


@dataclass(frozen=True)
class LayerInput:
    """What one attention layer saw in one forward pass.

    Attributes:
        hidden_states: (B, t, d), the input of the attention module, after the block's norm.
        positions: of these tokens.
        mask: what the module was given: None, a 2-D (B, kv) or 4-D tensor, or a flex-attention BlockMask.
        valid: (B, t) bool, False for padding; None where there is none.  The cache reads it off the mask.
    """

    hidden_states: torch.Tensor
    positions: Positions
    mask: Any
    valid: torch.Tensor | None = None

    def tokens(self, start: int, stop: int | None = None) -> "LayerInput":
        """The part of tokens start to stop (no mask)."""
        part = slice(start, stop)
        valid = None if self.valid is None else self.valid[:, part]
        return LayerInput(self.hidden_states[:, part], self.positions.tokens(start, stop), None, valid)

    @property
    def last(self) -> "LayerInput":
        """The part of the last token (no mask)."""
        return self.last_with(self.hidden_states[:, -1:])

    def last_with(self, hidden_states: torch.Tensor) -> "LayerInput":
        """The part of the last token (no mask), with a copy of its hidden states, (B, 1, d)."""
        valid = None if self.valid is None else self.valid[:, -1:]
        return LayerInput(hidden_states, self.positions.last, None, valid)

    def copied(self) -> "LayerInput":
        """The same in storage of its own, so that what it was cut from can be freed."""
        valid = None if self.valid is None else self.valid.clone()
        return LayerInput(self.hidden_states.clone(), self.positions.copied(), self.mask, valid)


class PrefillHooks:
    """Shows one cache what the attention layers see during one forward pass.

    Those of the blocks up to the first attention layer are put on when the forward pass begins, the others when that
    block has run: by then a GPU has work while Python does that.  Each takes itself off when its layer has run, and all
    go when a layer raises, when the next prefill begins in the same thread, or when the cache is gone.  So nothing is
    left on the model while it decodes.  A deep copy is for the same model, with nothing attached yet.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._handles: list[RemovableHandle] = []
        self._seen: dict[int, LayerInput] = {}
        self._positions: Positions | None = None
        self._left_behind: list[RemovableHandle] = []
        self._thread = 0
        self._is_untouched = False  # on, and no layer has run
        self._later: range | None = None  # blocks that get theirs when the first attention layer's has run
        for handles in (self._handles, self._left_behind):
            weakref.finalize(self, _remove_all, handles).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrefillHooks":
        return PrefillHooks(self._decoder)

    def attach(self, cache: Any) -> None:
        """Puts the hooks on; `cache.reset()` is called if the forward pass with that cache raises."""
        with _hook_lock:
            # `generate` may ask for mask sizes before the model itself does.
            if self._is_untouched and self._thread == threading.get_ident():
                return
            self._sweep()
            self._thread = threading.get_ident()
            first = min(self._decoder.attention)
            self._put_on(range(first + 1), weakref.ref(cache))
            self._is_untouched, self._later = True, range(first + 1, len(self._decoder.blocks))
            _attached.add(self)

    def attach_later(self, cache: "weakref.ref[Any]") -> None:
        """Puts on the hooks of the blocks behind the first attention layer, once in a pass."""
        with _hook_lock:
            if self._later is not None:
                self._put_on(self._later, cache)
                self._later = None

    def detach(self) -> None:
        """Takes all hooks off and forgets what was seen."""
        with _hook_lock:
            _remove_all(self._handles)
            _attached.discard(self)
            self._seen.clear()
            self._positions = self._later = None
            self._is_untouched = False

    def take(self, index: int) -> LayerInput | None:
        """What layer `index` saw in the forward pass under way, once."""
        return self._seen.pop(index, None)

    def record(self, index: int, inputs: LayerInput) -> None:
        """Keeps what layer `index` sees until `take`."""
        self._seen[index] = inputs

    def shared(self, positions: Positions) -> Positions:
        """The same positions; those of the layer before, with all that was made of them, if it was told the same."""
        if self._positions is None or not positions.is_that_of(self._positions):
            self._positions = positions
        return self._positions

    def finished(self, handle: RemovableHandle) -> None:
        """Takes one hook off."""
        with _hook_lock:
            self._is_untouched = False
            handle.remove()
            if handle in self._handles:
                self._handles.remove(handle)
            if not self._handles:
                _attached.discard(self)
                self._positions = None

    def abandon(self, handle: RemovableHandle) -> None:
        """Takes all hooks off while those of the block of `handle` are being run because it raised."""
        with _hook_lock:
            hooks = handle.hooks_dict_ref()
            # torch iterates over the dict itself then, which allows taking off only the last hook in it.  If another
            # thread has added a hook since, this one stays, without effect, until the next prefill.
            if hooks and next(reversed(hooks)) != handle.id:
                self._handles.remove(handle)
                self._left_behind.append(handle)
            self.detach()

    def _put_on(self, blocks: range, cache: "weakref.ref[Any]") -> None:
        for index in blocks:
            hook = _Hook(self, cache, self._decoder.attention.get(index))
            hook.put_on(self._handles, self._decoder.blocks[index])

    def _sweep(self) -> None:
        """Takes off what an interrupted forward pass of this thread left on the same model."""
        self.detach()
        _remove_all(self._left_behind)
        for other in list(_attached):
            if other._thread == threading.get_ident() and other._decoder.blocks[0] is self._decoder.blocks[0]:
                other.detach()


class _Hook:
    """The two hooks of one block: its attention module's input, and the end of the block."""

    def __init__(self, hooks: PrefillHooks, cache: "weakref.ref[Any]", layer: AttentionLayer | None) -> None:
        self._hooks = weakref.ref(hooks)
        self._cache = cache
        self._layer = layer
        self._before: RemovableHandle | None = None
        self._after: RemovableHandle | None = None

    def put_on(self, handles: list[RemovableHandle], block: nn.Module) -> None:
        if self._layer is not None:
            self._before = self._layer.module.register_forward_pre_hook(self.before_attention, with_kwargs=True)
            handles.append(self._before)
        self._after = block.register_forward_hook(self.after_block, with_kwargs=True, always_call=True)
        handles.append(self._after)

    # In another thread's forward pass torch may have just taken the mark off that says "with kwargs": then they are
    # missing, the output may stand in their place, and the call is not this cache's.
    def _is_mine(self, args: Any, kwargs: Any) -> bool:
        cache = self._cache()
        if cache is None or not isinstance(kwargs, dict):
            return False
        if any(kwargs.get(name) is cache for name in CACHE_ARGUMENTS):
            return True
        return any(value is cache for value in (*args, *kwargs.values()))

    def before_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        hooks = self._hooks()
        if hooks is None or not self._is_mine(args, kwargs):
            self._give_up(hooks, args, kwargs)
            return
        assert kwargs is not None
        assert self._before is not None
        assert self._layer is not None
        hooks.finished(self._before)
        given = {**dict(zip(self._layer.parameters, args, strict=False)), **kwargs} if args else kwargs
        hidden_states, cache = given["hidden_states"], self._cache()
        assert cache is not None
        positions = hooks.shared(self._layer.positions_of(hidden_states, given, cache))
        hooks.record(self._layer.index, LayerInput(hidden_states, positions, given.get("attention_mask")))

    def _give_up(self, hooks: PrefillHooks | None, args: Any, kwargs: Any) -> None:
        """Takes all hooks off if their pass runs without its cache: gradient checkpointing drops it."""
        is_without = isinstance(kwargs, dict) and not any(
            isinstance(value, Cache) for value in (*args, *kwargs.values())
        )
        if hooks is not None and is_without and hooks._thread == threading.get_ident():
            hooks.detach()

    def after_block(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        hooks = self._hooks()
        if hooks is None or not self._is_mine(args, kwargs):
            return
        assert self._after is not None
        if output is not None:
            if self._layer is not None:
                hooks.attach_later(self._cache)
            hooks.finished(self._after)
            return
        hooks.abandon(self._after)
        cache = self._cache()
        assert cache is not None
        cache.reset()


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that are not of a prefill, which another thread may be running."""
    with _hook_lock:
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(not isinstance(getattr(hook, "__self__", None), _Hook) for hook in hooks)


def _remove_all(handles: list[RemovableHandle]) -> None:
    with _hook_lock:
        while handles:
            handles.pop().remove()
