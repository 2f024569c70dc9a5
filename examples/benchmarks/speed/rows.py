"""What is measured of decoding, one row of the table after the other."""

from dataclasses import dataclass
from typing import Any

# The first tokens of each call: the prefill gives one, the next compiles, the next two record and check CUDA graphs.
UNTIMED = 4
# The first prompts of a new process, whose times and compilations are not counted.
WARMING_UP = 3
# What decodes on a compressed cache: `generate`'s own loop, and this package's.
LOOPS = ("generate", "decode_ahead")


@dataclass(frozen=True)
class Row:
    """One cache at one batch size and prompt length; None where it ran out of memory, or where there is no GPU.

    Attributes:
        cache: its name.
        batch: rows.
        tokens: of each row's prompt.
        new_tokens: generated for each row.
        decoding: "compiled" or "eager".
        milliseconds: per token of a row, the median of the runs' means.
        fastest, slowest: of the runs' means, in milliseconds.
        tokens_per_second: in all rows together.
        cache_bytes: held by the cache after the last token.
        decoding_bytes: allocated at the last token, beyond the model and whatever was there before.
        peak_bytes: of the whole call, likewise.
        graphs: compiled in the run that is not measured.
        graphs_while_measured: compiled later; more than 0 means that the times are not those of decoding alone.
        cudagraph_skips: compiled code that runs without CUDA graphs.
        error: "out of memory", or None.
    """

    cache: str
    batch: int
    tokens: int
    new_tokens: int
    decoding: str
    milliseconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    tokens_per_second: float | None = None
    cache_bytes: int | None = None
    decoding_bytes: int | None = None
    peak_bytes: int | None = None
    graphs: int = 0
    graphs_while_measured: int = 0
    cudagraph_skips: int = 0
    error: str | None = None


def read(record: dict[str, Any]) -> tuple[str, list[Row]]:
    """What the rows of a JSON record have in common, in words, and the rows.

    Raises:
        LookupError, TypeError: it is no record of decoding.
    """
    conditions = "{model}, {dtype}, {device}: {new_tokens} new tokens"
    return conditions.format(**record["settings"], **record["environment"]), [Row(**row) for row in record["rows"]]
