"""The models that cases run, built once and used again, and the prompts they are given."""

import math
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations import sdpa_attention

import models

if TYPE_CHECKING:
    from .case import Draws

# Experts are chosen by comparing numbers, so a rounding error may change a whole layer; dynamic rotary embeddings
# remember the longest prompt that the model has seen.
_LEFT_OUT = ("mixtral", "qwen3_moe", "llama-dynamic")
# Of the hybrids, those without a state that later passes overwrite.
SLIDING = ("gemma3_text", "qwen2")
DECODERS = ("qwen2", *(name for name in models.SUPPORTED if name not in (*_LEFT_OUT, *SLIDING)))
_MODELS_HELD = 32

Settings = tuple[tuple[str, Any], ...]

_repeat_kv = sdpa_attention.repeat_kv


@dataclass(frozen=True)
class TextModel:
    """A tiny decoder with random weights.

    Attributes:
        name: of `models.SUPPORTED`, or of `models.HYBRIDS` if `sliding`.
        sliding: whether some of its layers have a sliding window.
        kv_heads: of 4 heads; None: as the name says.
        attention: "sdpa" or "eager".
        weights: seed of the weights.
        dtype: of the weights.
    """

    name: str
    sliding: bool = False
    kv_heads: int | None = None
    attention: str = "sdpa"
    weights: int = 0
    dtype: str = "float32"

    @classmethod
    def draw(cls, draws: "Draws", *, sliding: float = 0.1, dtype: str = "float32") -> Self:
        """A decoder; this share of them has layers with a sliding window."""
        attention, weights = draws.one_of("sdpa", "sdpa", "eager"), draws.randrange(2)
        if draws.is_rare(sliding):
            return cls(draws.choice(SLIDING), True, None, attention, weights, dtype)
        name = draws.choice(DECODERS)
        kv_heads = draws.one_of(None, 1, 2, 4) if "-" not in name else None
        return cls(name, False, kv_heads, attention, weights, dtype)

    def build(self) -> PreTrainedModel:
        """The model, on the CPU."""
        changes = dict(models.HYBRIDS[self.name] if self.sliding else models.SUPPORTED[self.name])
        if self.kv_heads is not None:
            changes["num_key_value_heads"] = self.kv_heads
        model = models.text_model(self.name.split("-")[0], attention=self.attention, seed=self.weights, **changes)
        for parameter in model.parameters():  # not the rotary factors, as when a checkpoint is loaded
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return model


@dataclass(frozen=True)
class Prompts:
    """A left-padded batch of random token ids.

    Attributes:
        lengths: tokens of each row.
        seed: of the ids.
        period: the ids repeat after so many columns, so that looking up the prompt finds candidates; None: they do not.
    """

    lengths: tuple[int, ...]
    seed: int
    period: int | None = None

    @classmethod
    def draw(cls, draws: "Draws", *, rows: int = 3, shortest: int = 1, longest: int = 70) -> Self:
        """Up to so many rows; half of the batches are padded."""
        count, width = draws.randint(1, rows), draws.randint(shortest, longest)
        others = [draws.randint(1, width) if draws.is_rare(0.5) else width for _ in range(count - 1)]
        lengths = [width, *others]
        draws.shuffle(lengths)
        return cls(tuple(lengths), draws.randrange(2**31))

    @property
    def width(self) -> int:
        """Columns of the batch."""
        return max(self.lengths)

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask."""
        inputs = models.left_padded(list(self.lengths), seed=self.seed)
        if self.period is not None:
            copies = -(-self.width // self.period)
            ids = models.prompt_ids(len(self.lengths), self.period, seed=self.seed).repeat(1, copies)
            inputs["input_ids"] = ids[:, : self.width] * inputs["attention_mask"]
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def draw_budget(draws: "Draws", width: int, *, covering: bool = False) -> int | float:
    """A number of tokens or a share of a prompt of `width` columns; `covering`: not less than the prompt."""
    if covering:
        return draws.one_of(1.0, width, width + 1, width + draws.randint(2, 100))
    return draws.one_of(
        draws.randint(1, max(1, width - 1)),
        draws.randint(1, max(1, width // 4)),
        round(draws.uniform(0.01, 0.99), draws.randint(2, 4)),
    )


def draw_score(draws: "Draws", *, refit: bool = True) -> Settings:
    """Settings of ShiftKV: what scores count, and whether values are refitted, if the case has a reference for that."""
    weight = ("last_query_weight", draws.one_of(0.0, 1.0, 4.0))
    settings = draws.one_of((), (("score", "values"),), (("score", "values"), weight))
    queries = draws.one_of(0, 4, 64)
    return (*settings, ("refit_queries", queries)) if refit and queries else settings


def has_refit(settings: Settings) -> bool:
    """Whether values are refitted: then the masked full cache, which has the values as they were, is no reference."""
    return dict(settings).get("refit_queries", 0) > 0


def tokens_kept(budget: int | float, width: int) -> int:
    """How many of `width` columns a budget keeps."""
    return min(width, budget if isinstance(budget, int) else math.ceil(Decimal(str(budget)) * width))


def reads_wrong_masks(device: torch.device) -> bool:
    """Whether attention on a device gives the last of 65 queries the mask of the first, where heads share one KV head.

    A fault of torch's memory-efficient kernel on CUDA, mended in 2.14.1 (pytorch issue 191937): with keys and values
    whose heads have stride 0, and T % 64 == 1 queries with a mask.
    """
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(1, heads, 65, 32, generator=generator).to(device).expand(-1, 4, -1, -1) for heads in (4, 1, 1)
    )
    mask = torch.ones(65, 65, dtype=torch.bool, device=device).tril()
    found = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    expected = scaled_dot_product_attention(queries, keys.contiguous(), values.contiguous(), attn_mask=mask)
    return not torch.allclose(found, expected, atol=1e-2, rtol=1e-2)


def contiguous_repeat_kv(states: torch.Tensor, repeats: int) -> torch.Tensor:
    """As transformers repeats KV heads, but never a view with a stride of 0."""
    return _repeat_kv(states, repeats).contiguous()


class Bench:
    """Builds the models of cases on one device, and holds those used last.

    Args:
        device: where the models run.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._models: OrderedDict[Any, Any] = OrderedDict()
        self._folder = tempfile.TemporaryDirectory()
        # The full cache is what cases are compared with: it must not see tokens that are masked.
        if self.device.type == "cuda" and reads_wrong_masks(self.device):
            sdpa_attention.repeat_kv = contiguous_repeat_kv

    def text(self, wanted: TextModel) -> PreTrainedModel:
        """The decoder that a case asks for."""
        return self._held(wanted, lambda: wanted.build().to(self.device))

    def vision(self, family: str, attention: str) -> models.VisionCase:
        """The multimodal model that a case asks for."""

        def build() -> models.VisionCase:
            if family == "qwen2_5_vl":
                case = models.qwen2_5_vl(attention)
            else:
                case = models.llava_next(Path(self._folder.name) / family, family, attention)
            case.model.to(self.device)
            return case

        return self._held((family, attention), build)

    def hooks(self) -> int:
        """How many hooks there are on the decoders of all models held; image towers have some of their own."""
        held = (case.model if isinstance(case, models.VisionCase) else case for case in self._models.values())
        return sum(models.hooks_on(model.get_decoder()) for model in held)

    def forget(self) -> None:
        """Lets all models go, as after a failure that may have changed one."""
        self._models.clear()

    def _held(self, key: Any, build: Any) -> Any:
        if key not in self._models:
            self._models[key] = build()
            if len(self._models) > _MODELS_HELD:
                self._models.popitem(last=False)
        self._models.move_to_end(key)
        return self._models[key]


FIRST_LETTER = ord("a")


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny decoders' 128 tokens: each is a character, so that texts can be searched for strings."""
    names = ["<pad>", "<s>", "</s>", *(chr(FIRST_LETTER + index) for index in range(125))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
