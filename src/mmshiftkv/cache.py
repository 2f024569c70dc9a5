"""What transformers calls: a DynamicCache that selects from each layer's prompt while it is being prefilled."""

import copy
import os
import warnings
from dataclasses import asdict, replace
from numbers import Integral
from typing import Any, Self

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from .checks import BACKENDS, check_budget, check_choice, check_prefill
from .finite import FiniteCheck
from .methods.base import Method, check_method
from .model.decoder import Decoder, text_decoder
from .model.fingerprint import check_fingerprint, fingerprint_of
from .model.generation import check_turn, generate_call, is_compiling_prefill
from .model.hooks import PrefillHooks
from .model.offload import device_of
from .model.precision import without_autocast
from .prefill import Prefill, PromptSettings
from .report import CacheReport, report_of
from .saving import SavedCache, read, write
from .storage.base import Pair, Storage
from .storage.growing import GrowingLayer, GrowingStorage
from .storage.held import HeldLayer, held_by
from .storage.others import check_crop
from .storage.static import StaticStorage, obstacle_to_compiling


class PrefillSelectionCache(DynamicCache):
    """A cache that keeps, of each full-attention layer's prompt, the tokens that a method scores highest.

    The prompt itself is attended to in full; only what is stored is less.  Later tokens, those of later chat turns
    included, are all stored.  Positions go on as if nothing had been dropped.  Layers of other kinds (sliding window,
    linear attention, shared) hold what those of `DynamicCache(config=...)` do.

    One cache serves one conversation at a time: call `reset()` before another prompt.  Gradients do not flow through
    what is stored.

    Args:
        model: the model that the cache will be used with.
        method: gives the scores.
        budget: tokens kept per KV head and layer (int), or the share of the prompt's columns (float), rounded up.
        max_new_tokens: room for so many tokens behind what is kept of the prompt, in storage that stays where it is, so
            that `generate` compiles decoding; None: storage grows, and decoding is eager.
        prefill: "single", or "chunked" when several forward passes hold the prompt.
        prompt_length: columns of the whole prompt, for "chunked"; None: `end_prompt()` says that it is complete.
        backend: "auto" (Triton kernels on a GPU, plain torch elsewhere), "triton" or "torch".

    Raises:
        TypeError, ValueError: `model` is not supported (the message names what is missing), `method` is none, or a bad
            budget or prefill; or the method cannot score what a layer of the model stores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        budget: int | float,
        *,
        max_new_tokens: int | None = None,
        prefill: str = "single",
        prompt_length: int | None = None,
        backend: str = "auto",
    ) -> None:
        check_method(method)
        check_budget(budget)
        check_prefill(max_new_tokens, prefill, prompt_length)
        check_choice("backend", backend, BACKENDS)
        if isinstance(budget, Integral) and int(budget) < method.protected:
            raise ValueError(
                f"budget={budget} must be at least {method.protected}: {method} always keeps so many tokens"
            )
        text_model = text_decoder(model)
        super().__init__(config=model.config)
        # Exactly this class: its subclasses drop or share tokens by rules of their own.
        self._selected = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not self._selected:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in self.layers}))
            raise ValueError(
                f"model: {type(model).__name__} is not supported: it has no full-attention layer that holds nothing "
                f"else (its cache layers: {kinds})"
            )
        self._decoder = Decoder.of(model, self._selected, text_model)
        for layer in self._decoder.attention.values():
            method.check(layer)
        self._method = method
        self._settings = PromptSettings(budget, prefill, prompt_length, backend)
        self._hooks = PrefillHooks(self._decoder)
        self._max_new_tokens = max_new_tokens
        self._own_storage = self._make_storage(max_new_tokens)
        self._begin_conversation(self.layers)

    def _make_storage(self, max_new_tokens: int | None) -> Storage:
        settings = self._settings
        if max_new_tokens is not None:
            obstacle = obstacle_to_compiling(self._decoder, self.layers)
            if obstacle is None:
                return StaticStorage(self._decoder, settings.budget, max_new_tokens)
            warnings.warn(
                f"max_new_tokens={max_new_tokens} reserves nothing, and decoding is not compiled: {obstacle}",
                stacklevel=4,
            )
        return GrowingStorage()

    def _begin_conversation(self, fresh_layers: list[Any]) -> None:
        self._storage = self._own_storage
        # transformers before 5.18 resets sliding layers by zeros, which the next prompt would attend to: all are new.
        self.layers[:] = [
            GrowingLayer() if index in self._selected else self._storage.take_in(index, layer)
            for index, layer in enumerate(fresh_layers)
        ]
        # None as soon as the prompt has been selected from: then every token is stored.
        self._prefill: Prefill | None = Prefill(self._settings, self._decoder, self._hooks, self._method, self._storage)
        self._prompt_ids: torch.Tensor | None = None
        self._finite: FiniteCheck | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrefillSelectionCache":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a selecting cache holds on to its model and cannot be pickled; copy.deepcopy copies it")

    def kept_indices(self, layer: int) -> torch.Tensor | None:
        """The columns of the first prompt's input that `layer` holds.

        Returns:
            (batch, kv_heads, kept) int64, ascending, padding counted; it follows beams and row selection.  None before
            the prefill has ended, and for layers that are not compressed.

        Raises:
            ValueError: there is no such layer.
        """
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(self.layers):
            raise ValueError(f"layer={layer!r} must be an int from 0 to {len(self.layers) - 1}")
        return self.layers[layer].kept_indices if layer in self._selected else None

    def report(self) -> CacheReport:
        """Tokens seen and stored, bytes stored and saved, by layer and in all; prints as a table."""
        self._warn_of_numbers()
        return report_of(self.layers, self._decoder.rank)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the cache holds into a file, safetensors with JSON in its metadata.

        Raises:
            ValueError: there is no complete prompt, or the model has layers of other kinds than full attention.
            OSError: the file cannot be written; what was there stays as it was.
        """
        write(path, self.saved())

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel, **changes: Any) -> Self:
        """A cache that goes on where the saved one was.

        Args:
            path: a file of `save`, of a cache of this class.
            model: the model that it was saved with.
            changes: settings to take in place of the saved ones, such as `max_new_tokens` and `backend`; those of the
                selection have an effect on later prompts only.  A cache with a method of one's own needs `method`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError: the file is damaged, of a newer version, of another class or of another model; or as
                the class says.
        """
        return cls.of_saved(read(path), path, model, **changes)

    @classmethod
    def of_saved(cls, saved: SavedCache, path: Any, model: PreTrainedModel, **changes: Any) -> Self:
        """As `load`, of a file that has been read."""
        if saved.kind != cls.__name__:
            raise ValueError(f"{path}: holds a {saved.kind}, not a {cls.__name__}; use {saved.kind}.load")
        cache = cls(model, **{**saved.settings, **changes})
        check_fingerprint(saved.fingerprint, cache._decoder, path)
        keeps_slots = cache._max_new_tokens == saved.settings["max_new_tokens"]
        cache._go_on_with(
            {index: held if keeps_slots else replace(held, slots=None) for index, held in saved.layers.items()},
            saved.prompt_ids,
        )
        return cache

    def saved(self) -> SavedCache:
        """What `save` writes; raises as it does."""
        return SavedCache(
            type(self).__name__,
            self._settings_to_save(),
            fingerprint_of(self._decoder),
            self.held_layers(),
            self._prompt_ids,
        )

    def _settings_to_save(self) -> dict[str, Any]:
        """What the constructor takes besides the model, and a method of one's own."""
        return {**asdict(self._settings), "max_new_tokens": self._max_new_tokens}

    def held_layers(self) -> dict[int, HeldLayer]:
        """By number, what each layer holds; views of the storage.

        Raises:
            ValueError: there is no complete prompt, or the model has layers of other kinds than full attention.
        """
        if self._prefill is not None:
            raise ValueError("the cache holds no complete prompt: prefill one, and call end_prompt() behind chunks")
        if len(self._selected) < len(self.layers):
            others = [index for index in range(len(self.layers)) if index not in self._selected]
            raise ValueError(f"layers {others} are no full-attention layers: such caches are neither saved nor joined")
        return {index: held_by(self.layers[index]) for index in self._selected}

    def is_of_model_of(self, other: "PrefillSelectionCache") -> bool:
        """Whether both were built for the same model."""
        return self._decoder.blocks[0] is other._decoder.blocks[0]

    def with_layers(self, held: dict[int, HeldLayer], max_new_tokens: int | None) -> Self:
        """A new cache with the settings of this one, `max_new_tokens` and copies of other layers."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.layers = self._decoder.fresh_layers()
        twin._hooks = PrefillHooks(self._decoder)
        twin._max_new_tokens = max_new_tokens
        twin._own_storage = twin._make_storage(max_new_tokens)
        twin._begin_conversation(twin.layers)
        twin._go_on_with(held, None)
        return twin

    @torch.no_grad()
    def _go_on_with(self, held: dict[int, HeldLayer], prompt_ids: torch.Tensor | None) -> None:
        for index, layer in held.items():
            device = device_of(self._decoder.attention[index].module)
            self.layers[index] = self._storage.restore(index, layer.to(device))
        self._prefill, self._prompt_ids = None, prompt_ids

    @property
    def decoder(self) -> Decoder:
        """That of the model which the cache was built for."""
        return self._decoder

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile decoding: `max_new_tokens` was given, and nothing is in the way."""
        is_recording = any(getattr(layer, "record_past", False) for layer in self.layers)
        return self._storage.is_compileable and not is_recording and not is_compiling_prefill()

    def has_room_for(self, tokens: int) -> bool:
        """Whether so many more tokens fit into what `max_new_tokens` reserved; True where storage grows."""
        return self._storage.has_room_for(tokens)

    @torch.compiler.disable
    def begin_pass(self, tokens: int) -> None:
        """Hears of a forward pass of so many tokens before any layer runs.

        Raises:
            ValueError: an empty prompt, a cache whose last prefill was interrupted, a pass of which it cannot be known
                whether it is part of the prompt, or another prompt on a cache that holds a conversation.
        """
        self._storage.check()
        if self._prefill is not None:
            call = generate_call(self)
            self._prompt_ids = None if call is None else call.ids
            self._prefill.begin_pass(self, tokens, call)
        else:
            self._warn_of_numbers()
            if tokens > 1 and (call := generate_call(self)) is not None:
                check_turn(call, self._prompt_ids, int(self.get_seq_length()), tokens)
            self._storage.reserve(tokens)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in transformers, which asks for it before each forward pass and says nothing else of one.

        Raises:
            ValueError: as `begin_pass`.
        """
        self.begin_pass(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Pair:
        """Stores what is kept of new keys and values, (B, H_kv, t, D), and returns what this pass attends to.

        Raises:
            ValueError: the prompt is padded elsewhere than on the left, longer than `prompt_length`, or was not seen:
                the cache belongs to another model, or the model was given a ready-made 4-D mask.
        """
        if self._prefill is None or layer_idx not in self._selected:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._update_prompt(self._prefill, key_states, value_states, layer_idx)

    # A selection is kernels already; to trace it takes the compiler long, and gains nothing.
    @torch.compiler.disable
    def _update_prompt(self, prefill: Prefill, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> Pair:
        layer, given = self.layers[layer_idx], [one.detach() if one.requires_grad else one for one in (keys, values)]
        with torch.no_grad(), without_autocast(keys.device):
            self.layers[layer_idx], attended = prefill.update(layer_idx, layer, *given)
        if prefill.is_over:
            self._leave_prefill()
        return attended

    def _leave_prefill(self) -> None:
        assert self._prefill is not None
        self._prefill.join()
        self._finite, self._prefill = self._prefill.finite, None
        self._finite.end_prompt()
        self._warn_of_numbers()

    def _warn_of_numbers(self) -> None:
        """Warns of a prompt with numbers that are not finite as soon as that is known."""
        if self._finite is not None and self._finite.warn():
            self._finite = None

    @torch.no_grad()
    def end_prompt(self) -> None:
        """Says that the prompt is complete; what comes next is an answer, or a turn.

        Only needed where neither `generate` nor `prompt_length` tells it: after the last of several forward passes that
        hold a prompt, with `prefill="chunked"`.
        """
        if self._prefill is not None and self._prefill.is_collecting:
            for index in self._selected:
                self.layers[index] = self._prefill.finish(index, self.layers[index])
            self._leave_prefill()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is their number, negative.

        Raises:
            ValueError: it is positive, reaches into a compressed prompt, or a layer that is not compressed cannot take
                tokens back; nothing is changed then.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding may pass a tensor
        for index in self._selected:
            self.layers[index].check_crop(tokens_to_remove)
        if tokens_to_remove and self._prefill is not None and self._prefill.is_collecting:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: the prompt is not complete yet, and cannot be cropped; "
                "call end_prompt() if it is"
            )
        if tokens_to_remove and self.layers[self._selected[0]].stored == -tokens_to_remove:
            self.reset()
            return
        for layer in self.layers:
            check_crop(layer, tokens_to_remove)
        for layer in self.layers:
            # While the past is recorded, transformers' layers drop what they do not need any more even if it is none.
            if tokens_to_remove or getattr(layer, "record_past", False):
                layer.crop(tokens_to_remove)
        if self._prompt_ids is not None:
            self._prompt_ids = self._prompt_ids[:, : self.layers[self._selected[0]].prompt_columns]

    def activate_past_recording(self) -> None:
        """Assisted decoding begins: the next pass holds the prompt and candidates, and storage grows."""
        super().activate_past_recording()
        if self._prefill is not None:
            self._storage = GrowingStorage()
            self._prefill.expect_candidates(self._storage)

    def reset(self) -> None:
        """Empties the cache for another prompt."""
        self._hooks.detach()
        if self._prefill is not None:
            self._prefill.join()
        self._own_storage.release()
        self._begin_conversation(self._decoder.fresh_layers())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the batch rows `beam_idx`, in that order."""
        self._before_rows_change("reorder_cache")
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times.

        Raises:
            ValueError: as `batch_select_indices`.
        """
        self._before_rows_change("batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Takes the batch rows `indices`: numbers or a boolean mask.

        Raises:
            ValueError: storage grows, and the model has layers of linear attention, which cannot do that in
                transformers; nothing is changed then.
        """
        self._before_rows_change("batch_select_indices")
        super().batch_select_indices(indices)

    def _before_rows_change(self, name: str) -> None:
        lacking = sorted({type(layer).__name__ for layer in self.layers if not hasattr(layer, name)})
        if lacking:
            raise ValueError(f"{name}: layers of the kind {', '.join(lacking)} have no such method in transformers")
        self.end_prompt()
        self._prompt_ids = None
