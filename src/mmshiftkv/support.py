"""What a cache will do with a model: known before a prompt."""

from dataclasses import dataclass

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .model.decoder import Decoder, text_decoder
from .model.queries import AttentionLayer
from .report import aligned
from .storage.static import obstacle_to_compiling


@dataclass(frozen=True)
class LayerSupport:
    """What a cache will do with one layer.

    Attributes:
        index: the layer's number.
        kind: of the cache layer that transformers makes for it, such as "DynamicLayer".
        compressed: whether tokens are selected from its prompt.
        queries: "rebuilt" from the module's parts, or "asked" of the module; "" where none are made.
        notes: what else its logits and keys are made of: sinks, soft-capping, latents.
        obstacle: why a layer that should be compressed cannot be; None: nothing.
    """

    index: int
    kind: str
    compressed: bool
    queries: str = ""
    notes: tuple[str, ...] = ()
    obstacle: str | None = None


@dataclass(frozen=True)
class ModelSupport:
    """What a cache will do with a model; prints as a table.

    Attributes:
        model: the name of its class.
        layers: all layers of its text decoder; empty where none were found.
        obstacle: why no cache can be built for it; None: one can.
        obstacle_to_compiling: why decoding is not compiled with `max_new_tokens`; None: transformers compiles it, on a
            GPU.
    """

    model: str
    layers: tuple[LayerSupport, ...]
    obstacle: str | None
    obstacle_to_compiling: str | None

    @property
    def is_supported(self) -> bool:
        """Whether a cache can be built for the model."""
        return self.obstacle is None

    def __str__(self) -> str:
        rows = [("layer", "cache layer", "compressed", "queries", "notes")]
        for layer in self.layers:
            notes = layer.obstacle or ", ".join(layer.notes)
            rows.append((str(layer.index), layer.kind, "yes" if layer.compressed else "no", layer.queries, notes))
        lines = [f"{self.model}: {'supported' if self.is_supported else 'not supported'}"]
        if self.obstacle:
            lines.append(self.obstacle)
        elif self.obstacle_to_compiling:
            lines.append(f"decoding is not compiled: {self.obstacle_to_compiling}")
        else:
            lines.append("decoding is compiled on a GPU with max_new_tokens")
        return "\n".join([*lines, *(aligned(rows, left=True) if self.layers else [])])


def model_support(model: PreTrainedModel) -> ModelSupport:
    """What a cache will do with each layer of a model, and what is in the way.

    Nothing is run but three made-up tokens through each full-attention module, and only the first time.

    Args:
        model: a transformers model.

    Raises:
        TypeError: it is none.
    """
    name = type(model).__name__
    try:
        text_decoder(model)
    except ValueError as error:
        return ModelSupport(name, (), str(error), None)
    kinds = DynamicCache(config=model.config).layers
    layers = tuple(_layer_support(model, index, kind) for index, kind in enumerate(kinds))
    compressed = [layer.index for layer in layers if layer.compressed]
    obstacle = next((layer.obstacle for layer in layers if layer.obstacle), None)
    if obstacle is None and not compressed:
        obstacle = "it has no full-attention layer that holds nothing else"
    if obstacle is not None:
        return ModelSupport(name, layers, obstacle, None)
    return ModelSupport(name, layers, None, obstacle_to_compiling(Decoder(model, compressed), kinds))


def _layer_support(model: PreTrainedModel, index: int, layer: object) -> LayerSupport:
    kind = type(layer).__name__
    if type(layer) is not DynamicLayer:
        return LayerSupport(index, kind, False)
    try:
        attention = Decoder(model, [index]).attention[index]
    except ValueError as error:
        return LayerSupport(index, kind, False, obstacle=str(error))
    return LayerSupport(index, kind, True, "rebuilt" if attention.facts.is_rebuilt else "asked", _notes(attention))


def _notes(attention: AttentionLayer) -> tuple[str, ...]:
    facts = attention.facts
    notes = {
        "attention sinks": facts.has_sinks,
        f"soft-capping at {facts.softcap}": facts.softcap is not None,
        "stores latents": facts.is_latent,
    }
    return tuple(note for note, holds in notes.items() if holds)
