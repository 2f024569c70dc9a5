"""The last query's attention with the length of the values as a method."""

from dataclasses import dataclass

from benchmarks.quality.peers.snapkv_values import SnapKVValues


@dataclass(frozen=True)
class LastQueryValues(SnapKVValues):
    """The attention of the last prompt token's query times the length of the token's value.

    It is `SnapKVValues` with a window of one token and no pooling, so the attention is averaged over the query heads of
    a KV head, and the last token alone is always kept.  That the last query tells which tokens matter is the idea of
    TOVA (Oren et al., EMNLP 2024, https://arxiv.org/abs/2401.06104), which averages it over all heads of a layer and
    evicts while it decodes; values enter as in VATP (https://arxiv.org/abs/2406.12335).
    """

    window: int = 1
    kernel_size: int = 1
