"""Measures how far hidden states spread while a model decodes, against its prompts: a gamma for each layer."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from shiftkv_kernels import token_statistics
from shiftkv_kernels.reference import prompt_statistics

from ..checks import check_integer
from ..model.arguments import CACHE_ARGUMENT
from ..model.decoder import Decoder, text_decoder
from ..model.padding import check_left_padding
from .figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNMEASURED_GAMMA = 1.0  # of layers that no cache selects from: a number must stand there, and nothing reads it

_Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's attention input, after the block's norm: scalars over tokens and features, as the method takes them.

    Mean and (unbiased) deviation are taken for each prompt by itself and then averaged over the prompts, because a
    cache sees one prompt at a time.

    Attributes:
        index: the layer's number.
        prefill_mean, prefill_std: over the prompt's tokens.
        decode_mean, decode_std: over the generated tokens that were fed back.
        lowest_ratio, highest_ratio: extremes over the prompts of decode deviation / prefill deviation.
    """

    index: int
    prefill_mean: float
    prefill_std: float
    decode_mean: float
    decode_std: float
    lowest_ratio: float
    highest_ratio: float

    @property
    def ratio(self) -> float:
        """decode_std / prefill_std: what gamma stands for."""
        return self.decode_std / self.prefill_std


@dataclass(frozen=True)
class Calibration:
    """Statistics of a model's attention inputs in prefill and while decoding; prints as a table.

    Attributes:
        num_layers: decoder layers of the model.
        prompts: how many prompts were measured.
        prefill_tokens, decode_tokens: tokens of all prompts together, padding not counted.
        layers: the measured layers, those that a selecting cache compresses.
    """

    num_layers: int
    prompts: int
    prefill_tokens: int
    decode_tokens: int
    layers: tuple[LayerStatistics, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Decode deviation / prefill deviation of each measured layer."""
        return tuple(layer.ratio for layer in self.layers)

    def gamma(self) -> tuple[float, ...]:
        """The ratios as `ShiftKVConfig.gamma` takes them: a number for each decoder layer of the model.

        A measured ratio need not be the best gamma: compare answers before using it.  The small model in this
        repository has ratios near 1, and gamma 10 answers better than 1 with 64 tokens, worse with 32
        (docs/settings.md).  Layers that are never compressed were not measured; they get 1, which nothing reads.
        """
        measured = {layer.index: layer.ratio for layer in self.layers}
        return tuple(measured.get(index, UNMEASURED_GAMMA) for index in range(self.num_layers))

    def save(self, path: str | Path) -> None:
        """Writes a JSON file; ratios are in it for its readers, and computed again by `load`."""
        record = asdict(self)
        for layer, ratio in zip(record["layers"], self.ratios, strict=True):
            layer["ratio"] = ratio
        Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is not such a one.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = [{name: value for name, value in layer.items() if name != "ratio"} for layer in record["layers"]]
            return cls(**{**record, "layers": tuple(LayerStatistics(**layer) for layer in layers)})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"path={str(path)!r} is no calibration written by save: {error}") from error

    def __str__(self) -> str:
        header = ["layer", "prefill mean", "prefill std", "decode mean", "decode std", "ratio", "lowest", "highest"]
        rows = [
            [
                str(layer.index),
                *(f"{value:.4f}" for value in (layer.prefill_mean, layer.prefill_std)),
                *(f"{value:.4f}" for value in (layer.decode_mean, layer.decode_std)),
                *(f"{value:.3f}" for value in (layer.ratio, layer.lowest_ratio, layer.highest_ratio)),
            ]
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)) for row in [header, *rows]]
        counts = f"{self.prompts} prompts, {self.prefill_tokens} prompt tokens, {self.decode_tokens} decoded tokens"
        return "\n".join([*lines, counts])

    def draw(self) -> "Figure":
        """The ratio of each layer as a point, with its range over the prompts; the dashed line is an equal spread.

        Ratios are on a logarithmic axis: twice the spread is as far from the line as half of it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
        """
        figure = new_figure(min(max(6.0, 1.5 + 0.3 * self.num_layers), 10.0), 3.6)
        axes = figure.subplots()
        places = [layer.index for layer in self.layers]
        lowest = [layer.lowest_ratio for layer in self.layers]
        highest = [layer.highest_ratio for layer in self.layers]
        axes.axhline(1, color="tab:red", linestyle="--", linewidth=1.2, label="same spread as in prefill")
        axes.vlines(places, lowest, highest, color="tab:blue", alpha=0.5, linewidth=3, label="range over prompts")
        axes.plot(places, self.ratios, "o", color="tab:blue", markersize=5, label="average")
        axes.set(
            xlabel="decoder layer", ylabel="std while decoding / std in prefill", xlim=(-0.5, self.num_layers - 0.5)
        )
        axes.set_xticks(range(0, self.num_layers, 1 if self.num_layers <= 16 else 2 if self.num_layers <= 40 else 5))
        _scale_ratios(axes, min(lowest), max(highest))
        axes.set_title(f"Attention input, {self.prompts} prompts, {self.decode_tokens} decoded tokens", fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
        return figure


def _scale_ratios(axes: "Axes", lowest: float, highest: float) -> None:
    """A logarithmic y axis around these ratios and 1, and ticks that are read as they stand."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(lowest, 1.0), max(highest, 1.0)
    margin = max((high / low) ** 0.08, 1.005)
    # Over less than a factor of 5 an axis with ticks at 1, 2, 5, 10 ... has next to none.
    near = high / low < 5
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]) if near else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def measure_statistics(
    model: PreTrainedModel, prompts: Iterable[Mapping[str, Any]], *, max_new_tokens: int = 64
) -> Calibration:
    """Answers prompts greedily with the full cache and measures each layer's attention input (method, step 1).

    Each batch row counts as one prompt.  Padding is left out, and so is what a row is fed once it has ended.  A row
    that ends with its first token has nothing decoded and is left out of everything.

    Args:
        model: any model that a `PrefillSelectionCache` supports.
        prompts: inputs of `generate`, on the model's device: (B, T) input_ids, left-padded if B > 1 prompts differ in
            length, with an attention_mask then, and whatever belongs to the images.
        max_new_tokens: at most so many tokens are generated for each prompt, >= 2: the first comes of the prefill.

    Returns:
        float32 statistics, as Python numbers.

    Raises:
        TypeError: a prompt is no mapping with input_ids.
        ValueError: no prompt, none with a decoded token, a padding that is not on the left, or a model that is not
            supported.
    """
    check_integer("max_new_tokens", max_new_tokens, minimum=2)
    text_decoder(model)
    kinds = DynamicCache(config=model.config).layers
    indices = [index for index, layer in enumerate(kinds) if type(layer) is DynamicLayer]
    if not indices:
        raise ValueError(f"model: {type(model).__name__} is not supported: it has no full-attention layer")
    decoder = Decoder(model, indices)
    features = model.config.get_text_config(decoder=True).hidden_size
    measured: list[torch.Tensor] = []
    prefill_tokens = decode_tokens = 0
    for inputs in prompts:
        prompt, decoded, states = _run(model, decoder, inputs, max_new_tokens)
        has_answer = decoded.any(dim=1)
        prefill_tokens += int(prompt[has_answer].sum())
        decode_tokens += int(decoded.sum())
        measured.append(_statistics(states, features, prompt, decoded)[..., has_answer.cpu()])
    if not measured:
        raise ValueError("prompts is empty: at least one is needed")
    rows = torch.cat(measured, dim=-1)
    if not rows.shape[-1]:
        raise ValueError("prompts: every answer ended with its first token, so nothing was decoded")
    layers = [_summary(index, values) for index, values in zip(indices, rows, strict=True)]
    return Calibration(len(decoder.blocks), rows.shape[-1], prefill_tokens, decode_tokens, tuple(layers))


@torch.no_grad()
def _run(
    model: PreTrainedModel, decoder: Decoder, inputs: Mapping[str, Any], max_new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, list[_Pair]]:
    """Generates once.

    Returns:
        Which prompt columns count, (B, T) bool; which decoding steps count, (B, steps) bool; and for each layer the
        token statistics of all columns, two (B, T + steps) float32.
    """
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), torch.Tensor):
        raise TypeError(f"prompts must hold mappings with a tensor 'input_ids', not {type(inputs).__name__}")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    prompt = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    check_left_padding(prompt)
    with _recorded(decoder) as pieces:
        output = model.generate(
            **inputs,
            **{CACHE_ARGUMENT: DynamicCache(config=model.config)},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=False,
        )
    # The last token is never fed back, and those after a row's end are not its own.
    decoded = ~_has_ended(model, output[:, ids.shape[1] : -1])
    states = [_joined(of_layer) for of_layer in pieces.values()]
    columns = states[0][0].shape[1]
    if columns != ids.shape[1] + decoded.shape[1]:
        raise ValueError(
            f"input_ids: {ids.shape[1]} columns and {decoded.shape[1]} decoding steps, but the layers saw {columns} "
            "tokens: use a processor that writes one placeholder for each visual token"
        )
    return prompt, decoded, states


@contextmanager
def _recorded(decoder: Decoder) -> Iterator[dict[int, list[_Pair]]]:
    """Collects the token statistics of each layer, pass by pass, as long as the context lasts."""
    pieces: dict[int, list[_Pair]] = {index: [] for index in decoder.attention}
    handles = []
    try:
        for index, layer in decoder.attention.items():

            def record(module: Any, args: Any, kwargs: dict[str, Any], pieces: list[_Pair] = pieces[index]) -> None:
                hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                pieces.append(token_statistics(hidden_states))

            handles.append(layer.module.register_forward_pre_hook(record, with_kwargs=True))
        yield pieces
    finally:
        for handle in handles:
            handle.remove()


def _joined(pieces: list[_Pair]) -> _Pair:
    means, squares = zip(*pieces, strict=True)
    return torch.cat(means, dim=1), torch.cat(squares, dim=1)


def _has_ended(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """(B, n) bool: whether the row ended at this token or before."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=tokens.device)
    return torch.isin(tokens, ends).cumsum(dim=1) > 0


def _statistics(states: list[_Pair], features: int, prompt: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Mean and deviation in prefill, mean and deviation in decoding: (layers, 4, B) float32 on the CPU."""
    width = prompt.shape[1]
    result = []
    for means, squares in states:
        parts: list[torch.Tensor] = []
        for columns, valid in ((slice(0, width), prompt), (slice(width, None), decoded)):
            tokens = means[:, columns], squares[:, columns]
            parts += prompt_statistics(*tokens, features, valid=valid.to(means.device))
        result.append(torch.stack(parts).cpu())
    return torch.stack(result)


def _summary(index: int, values: torch.Tensor) -> LayerStatistics:
    """The averages over the prompts of (4, prompts) statistics."""
    prefill_mean, prefill_std, decode_mean, decode_std = (float(value) for value in values.double().mean(dim=1))
    ratios = (values[3] / values[1]).tolist()
    if not math.isfinite(decode_std) or not prefill_std > 0:
        raise ValueError(f"model: the attention input of layer {index} is constant or not finite")
    return LayerStatistics(index, prefill_mean, prefill_std, decode_mean, decode_std, min(ratios), max(ratios))
