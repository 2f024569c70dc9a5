"""Where in an image each visual token of a prompt lies, and how many heads of a cache keep it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache import PrefillSelectionCache

KeptTokens = PrefillSelectionCache | torch.Tensor | Sequence[torch.Tensor | None]
Extent = tuple[float, float, float, float]

_SUPPORTED = "Qwen-VL models (inputs with image_grid_thw) and LLaVA-NeXT (inputs with image_sizes)"


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Visual tokens that tile an image in rows and columns.

    Attributes:
        name: "image"; of LLaVA-NeXT "base image" (the whole image, small) and "crops" (the same, in more detail).
        counts: (rows, cols) int64, how many (layer, KV head) pairs keep each token.
        columns: (rows, cols) int64, the tokens' columns in the prompt's input, padding counted.
        extent: left, top, right and bottom edge of the grid in the image, whose own edges are 0, 0, 1 and 1.  Crops may
            end a little inside or outside of the image, as whole patches of padding are cut off.
        newline_counts, newline_columns: (rows,) int64, the same of the tokens that end LLaVA's rows; else None.
    """

    name: str
    counts: torch.Tensor
    columns: torch.Tensor
    extent: Extent
    newline_counts: torch.Tensor | None = None
    newline_columns: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class VisualTokenMap:
    """How many (layer, KV head) pairs keep each visual token of one image, and each text token of its prompt.

    Attributes:
        grids: one of Qwen-VL; "base image" and "crops" of LLaVA-NeXT.
        layers: the layers that were counted.
        pairs: (layer, KV head) pairs that were counted: the most that a token can have.
        kept: tokens that these pairs keep together, those of other images, videos and padding included.
        text_ids, text_columns, text_counts: (n,) int64, the prompt's tokens that are neither visual nor padding.
    """

    grids: tuple[TokenGrid, ...]
    layers: tuple[int, ...]
    pairs: int
    kept: int
    text_ids: torch.Tensor
    text_columns: torch.Tensor
    text_counts: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """(rows, cols) int64, the counts of the finest grid."""
        return self.grids[-1].counts

    @property
    def visual_share(self) -> float:
        """Share of all kept tokens that belong to this image, ends of rows included."""
        parts = [part for grid in self.grids for part in (grid.counts, grid.newline_counts) if part is not None]
        return sum(int(part.sum()) for part in parts) / self.kept


def visual_token_map(
    model: PreTrainedModel, inputs: Mapping[str, Any], kept: KeptTokens, *, image: int = 0, layer: int | None = None
) -> VisualTokenMap:
    """Counts how many (layer, KV head) pairs keep each token, and puts visual tokens in their places.

    Args:
        model: a Qwen-VL model (any whose processor gives `image_grid_thw`) or a LLaVA-NeXT.
        inputs: what the processor made of the prompt, the first one that the cache was given.
        kept: a cache after its prefill, or what its `kept_indices` gives: (B, H_kv, kept) int64 for each layer (None
            for one that is not compressed), or of one layer alone.
        image: which image, counted through the whole batch; it also chooses the batch row.
        layer: one layer; None: all that are compressed.

    Raises:
        TypeError: a model of another family.
        ValueError: there is no such layer or image, the prompt has no visual tokens, or inputs and cache are not of the
            same prompt; the message says what there is.
    """
    chosen = _chosen_layers(kept, layer)
    places = _image_places(model, inputs)
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < len(places):
        raise ValueError(f"image={image!r} must be an int from 0 to {len(places) - 1}: {len(places)} in the prompt")
    ids = inputs["input_ids"].cpu()
    row, columns = _image_columns(ids, model.config.image_token_id, [place.tokens for place in places], image)
    counts = _counts(chosen, row, ids.shape)
    grids = tuple(part.grid(columns, counts) for part in places[image].parts)

    mask = inputs.get("attention_mask")
    is_text = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row].cpu().bool()
    for name in ("image_token_id", "video_token_id"):
        is_text = is_text & (ids[row] != getattr(model.config, name, -1))
    text = is_text.nonzero()[:, 0]
    pairs = sum(indices.shape[1] for indices in chosen.values())
    return VisualTokenMap(grids, tuple(chosen), pairs, int(counts.sum()), ids[row][text], text, counts[text])


@dataclass(frozen=True)
class _Part:
    """A grid by its tokens' numbers in the image: `numbers` (rows, cols), `newlines` (rows,) or None."""

    name: str
    numbers: torch.Tensor
    extent: Extent
    newlines: torch.Tensor | None = None

    def grid(self, columns: torch.Tensor, counts: torch.Tensor) -> TokenGrid:
        """The grid of an image whose tokens are in these columns, (tokens,), of a prompt with these counts, (T,)."""
        tokens = columns[self.numbers]
        if self.newlines is None:
            return TokenGrid(self.name, counts[tokens], tokens, self.extent)
        ends = columns[self.newlines]
        return TokenGrid(self.name, counts[tokens], tokens, self.extent, counts[ends], ends)


@dataclass(frozen=True)
class _Places:
    """What the `tokens` visual tokens of one image show."""

    tokens: int
    parts: tuple[_Part, ...]


def _chosen_layers(kept: KeptTokens, layer: int | None) -> dict[int, torch.Tensor]:
    """(B, H_kv, kept) by layer, of the layers to count."""
    if isinstance(kept, PrefillSelectionCache):
        kept = [kept.kept_indices(index) for index in range(len(kept.layers))]
    elif isinstance(kept, torch.Tensor):
        kept = [kept]
    elif not isinstance(kept, Sequence):
        raise TypeError(
            f"kept must be a cache that selects tokens, its kept_indices of a layer or a list of them for all layers, "
            f"not {type(kept).__name__}"
        )
    there = {index: indices.cpu() for index, indices in enumerate(kept) if indices is not None}
    if not there:
        raise ValueError("kept: no layer has kept indices; the cache has seen no prompt yet")
    if layer is None:
        return there
    if isinstance(layer, bool) or layer not in there:
        raise ValueError(f"layer={layer!r} must be one of the compressed layers {', '.join(map(str, there))}")
    return {layer: there[layer]}


def _counts(chosen: dict[int, torch.Tensor], row: int, shape: torch.Size) -> torch.Tensor:
    """(T,) int64: how many (layer, KV head) pairs keep each column of one row of (B, T) inputs."""
    counts = torch.zeros(shape[1], dtype=torch.long)
    for layer, indices in chosen.items():
        if indices.shape[0] != shape[0] or int(indices.max()) >= shape[1]:
            raise ValueError(
                f"kept: layer {layer} keeps columns up to {int(indices.max())} of {indices.shape[0]} rows, but "
                f"input_ids has {shape[1]} columns and {shape[0]} rows: it is not of this prompt"
            )
        counts += torch.bincount(indices[row].flatten(), minlength=shape[1])
    return counts


def _image_columns(ids: torch.Tensor, image_token: int, lengths: list[int], image: int) -> tuple[int, torch.Tensor]:
    """The batch row of an image and its tokens' columns, (tokens,)."""
    flat = (ids.flatten() == image_token).nonzero()[:, 0]
    if len(flat) != sum(lengths):
        raise ValueError(
            f"input_ids has {len(flat)} image tokens, but the {len(lengths)} image(s) of the inputs make {sum(lengths)}"
        )
    start = sum(lengths[:image])
    own = flat[start : start + lengths[image]]
    return int(own[0]) // ids.shape[1], own % ids.shape[1]


def _image_places(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[_Places]:
    """What the visual tokens of each image show, images in the order of the batch."""
    config = model.config
    if config.model_type == "llava_next":
        key = "image_sizes"
    elif hasattr(getattr(config, "vision_config", None), "spatial_merge_size") and hasattr(config, "image_token_id"):
        key = "image_grid_thw"
    else:
        raise TypeError(f"model: {type(model).__name__} is not supported; supported are {_SUPPORTED}")
    if inputs.get(key) is None or not len(inputs[key]):
        raise ValueError(f"inputs: no visual tokens, as there is no {key}; there are {', '.join(inputs)}")
    if key == "image_sizes":
        return [_llava_next_places(model, *map(int, size)) for size in inputs[key]]
    merge = int(config.vision_config.spatial_merge_size)
    return [_grid_places(*(int(number) for number in grid), merge=merge) for grid in inputs[key]]


def _grid_places(frames: int, height: int, width: int, *, merge: int) -> _Places:
    """Of Qwen-VL: row by row, each token a square of merge x merge patches; the image is stretched to fit."""
    rows, cols = frames * height // merge, width // merge
    return _Places(rows * cols, (_Part("image", torch.arange(rows * cols).view(rows, cols), (0.0, 0.0, 1.0, 1.0)),))


def _llava_next_places(model: Any, height: int, width: int) -> _Places:
    """Of LLaVA-NeXT, for an image of this size in pixels: the base image, then the crops with the ends of rows.

    The model's own packing tells where things go: it is given patch numbers in place of their features, and -1 as the
    newline.
    """
    from transformers.image_processing_utils import select_best_resolution  # needs what only image prompts need

    config = model.config
    side = config.vision_config.image_size
    grid = side // config.vision_config.patch_size
    canvas_height, canvas_width = select_best_resolution((height, width), config.image_grid_pinpoints)
    tile_cols = canvas_width // side
    tiles = 1 + canvas_height // side * tile_cols
    patches = torch.arange(tiles * grid * grid, dtype=torch.float64).view(tiles, grid * grid, 1)
    packed, _ = model.pack_image_features(
        [patches],
        torch.tensor([[height, width]]),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=torch.tensor([-1.0], dtype=torch.float64),
    )
    numbers = packed[0][:, 0].long()
    base, crops = torch.arange(grid * grid).view(grid, grid), torch.arange(grid * grid, len(numbers))
    cols = int((numbers[grid * grid :] < 0).nonzero()[0])
    crops = crops.view(-1, cols + 1)

    # The first patch that was left tells how many rows and columns of padding were cut off.
    tile, inside = divmod(int(numbers[grid * grid]) - grid * grid, grid * grid)
    top = tile // tile_cols * grid + inside // grid
    left = tile % tile_cols * grid + inside % grid
    vertical = _edges(top, len(crops), side / grid, height, canvas_height, canvas_width / width)
    horizontal = _edges(left, cols, side / grid, width, canvas_width, canvas_height / height)
    extent = (horizontal[0], vertical[0], horizontal[1], vertical[1])
    whole = (0.0, 0.0, 1.0, 1.0)
    return _Places(
        len(numbers), (_Part("base image", base, whole), _Part("crops", crops[:, :-1], extent, crops[:, -1]))
    )


def _edges(first: int, count: int, patch: float, length: int, canvas: int, other_scale: float) -> tuple[float, float]:
    """Along one axis: first and last edge of `count` patches, in fractions of an image on a padded canvas.

    Args:
        first: number of the first patch on the canvas.
        patch: pixels of a patch.
        length, canvas: pixels of image and canvas.
        other_scale: by how much the other axis could be scaled until it fills the canvas.
    """
    # The image keeps its proportions, is rounded up to whole pixels, and stands in the middle of the canvas.
    scaled = min(math.ceil(length * min(canvas / length, other_scale)), canvas)
    offset = (canvas - scaled) // 2
    return (first * patch - offset) / scaled, ((first + count) * patch - offset) / scaled
