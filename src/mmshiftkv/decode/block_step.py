"""Steps of decoding whose blocks share one compiled function, recorded as a whole."""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shiftkv_kernels import MOST_ROWS

from ..cache import PrefillSelectionCache
from ..storage.static import StaticLayer
from ..storage.windows import WindowLayer
from .block_cache import block_cache, lengths_of, tensors_of
from .block_programs import Backend, BlockPrograms, block_backend
from .masks import StepMasks
from .recording import Inputs, Recorder
from .signature import signature_of_modules, signature_of_tensors, signature_of_values
from .twin import modules_of_step, path_to_blocks, twin_of

_IDS, _POSITIONS, _MASK = "input_ids", "position_ids", "attention_mask"
_DENSE = torch.contiguous_format


class BlockDecoding:
    """What is compiled and recorded of one model.

    Args:
        device: of the model.
        backend: of torch.compile.
    """

    def __init__(self, device: torch.device, backend: Backend = block_backend) -> None:
        self.device = device
        self.programs = BlockPrograms(backend)
        self.recorder = Recorder(device)


# By model; all of it goes with the model.
_decodings: "weakref.WeakKeyDictionary[PreTrainedModel, BlockDecoding]" = weakref.WeakKeyDictionary()


def decoding_of(model: PreTrainedModel) -> BlockDecoding:
    """What is compiled and recorded of a model, for as long as it stays on its device."""
    found = _decodings.get(model)
    if found is None or found.device != model.device:
        found = _decodings[model] = BlockDecoding(model.device)
    return found


class BlockRunner:
    """What the blocks of a twin do in place of their own: all of a kind are run by one compiled function.

    Nothing in it leads back to the twin: without a cycle the cache's storage is free as soon as the cache is.

    Args:
        cache: that is decoded on.
        programs: of the model.
        rows: of the batch.
    """

    def __init__(self, cache: PrefillSelectionCache, programs: BlockPrograms, rows: int) -> None:
        self._cache = cache
        self._programs = programs
        # With more rows no kernel is taken.  A function of their own leaves the other one more of the few times that
        # torch compiles the same function anew.
        self._are_few = rows <= MOST_ROWS
        self._caches = [block_cache(layer) for layer in cache.layers]

    def __call__(self, number: int, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Runs a block with the cache of its own layer in place of the whole one."""
        layer, cache = self._cache.layers[number], self._caches[number]
        kind = type(block), type(layer), getattr(layer, "sliding_window", None), self._are_few
        run = self._programs.of_kind(kind)
        return run(
            block,
            *(cache if value is self._cache else value for value in args),
            **{name: cache if value is self._cache else value for name, value in kwargs.items()},
        )


class BlockStep:
    """Steps that run a twin of a model, and count up all that is the same in every step with it.

    Args:
        model: one without `obstacle_to_blocks`.
        inputs: of the first step, as `prepare_inputs_for_generation` makes them.
        cache: that is decoded on.
        decoding: of the model.
    """

    def __init__(
        self, model: PreTrainedModel, inputs: dict[str, Any], cache: PrefillSelectionCache, decoding: BlockDecoding
    ) -> None:
        self._model = model
        self._cache = cache
        self._decoding = decoding
        path = path_to_blocks(model, cache.decoder.blocks)
        assert path is not None
        self._path = path
        # Of masks by kind of layer, those of some kinds are None in every step.
        self._settings = {
            name: value for name, value in inputs.items() if value is not cache and not _has_tensors(value)
        }
        self._cache_arguments = {name: value for name, value in inputs.items() if value is cache}
        masks = inputs[_MASK]
        self._kinds = [*masks] if isinstance(masks, dict) else None
        self._code = (
            signature_of_modules(modules_of_step(model, path)),
            signature_of_values({**vars(cache.decoder.text_config), **self._settings}),
        )
        self._bind(_tensors_by_name(inputs), first=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, tokens: torch.Tensor) -> None:
        """As in `Step`."""
        self._cache.begin_pass(1)
        self._masks.follow_storage()
        if self._has_moved():
            self._bind({**self._recording.inputs, **_tensors_by_name({_MASK: self._masks.current})})
        self._recording.inputs[_IDS].copy_(tokens)

    @torch.inference_mode(False)
    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """As in `Step`."""
        return self._recording.run(self._run)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _bind(self, inputs: Inputs, first: bool = False) -> None:
        """Takes the recording for the storage that the cache has now, and gives it the inputs."""
        layers = self._cache.layers
        key = (
            self._code,
            signature_of_tensors(tensors_of(layers)),
            tuple((name, part.shape, part.dtype, part.device) for name, part in inputs.items()),
        )
        self._recording = self._decoding.recorder.find(
            key, lambda: {name: torch.empty_like(part, memory_format=_DENSE) for name, part in inputs.items()}
        )
        for name, part in inputs.items():
            self._recording.inputs[name].copy_(part)
        if first and _POSITIONS in self._recording.inputs:
            # Every step begins by counting up.
            self._recording.inputs[_POSITIONS].sub_(1)
        self._inputs = _by_argument(self._recording.inputs, self._kinds)
        self._masks = StepMasks(self._inputs[_MASK], self._cache)
        self._slots = [(layer, layer.keys) for layer in layers if isinstance(layer, (StaticLayer, WindowLayer))]
        self._twin: Any = None
        if not self._recording.is_recorded:
            runner = BlockRunner(self._cache, self._decoding.programs, self._recording.inputs[_IDS].shape[0])
            self._twin = twin_of(self._model, self._path, runner)

    def _has_moved(self) -> bool:
        return any(layer.keys is not keys for layer, keys in self._slots)

    def _run(self) -> torch.Tensor:
        """All that is the same in every step."""
        if _POSITIONS in self._inputs:
            self._inputs[_POSITIONS].add_(1)
        inputs = {**self._settings, **self._inputs, _MASK: self._masks.show(), **self._cache_arguments}
        logits = self._twin(**inputs, return_dict=True).logits[:, -1].to(dtype=torch.float32, copy=True)
        for lengths in lengths_of(self._cache.layers):
            lengths.advance(1)
        return logits


def _has_tensors(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(part, torch.Tensor) for part in parts)


def _tensors_by_name(inputs: dict[str, Any]) -> Inputs:
    """The tensors of a step's inputs, masks by kind; those of images are left out, which no step reads."""
    rows = inputs[_IDS].shape[0] if _IDS in inputs else None
    found: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            found.update({(name, kind): part for kind, part in value.items() if part is not None})
        elif isinstance(value, torch.Tensor) and (name == _MASK or value.shape[-2:] == (rows, 1)):
            found[name] = value
    return found


def _by_argument(inputs: Inputs, kinds: list[str] | None) -> dict[str, Any]:
    """The tensors as the model takes them; masks of these kinds, or one for all."""
    found: dict[str, Any] = {name: part for name, part in inputs.items() if isinstance(name, str)}
    if kinds is not None:
        found[_MASK] = {kind: inputs.get((_MASK, kind)) for kind in kinds}
    return found
