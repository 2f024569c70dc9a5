"""Training batches of the tiny LLaVA-NeXT: documents of one size, each with several question-answer segments."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tiny_vlm.batches import Segment, character_grid, pack, stack
from tiny_vlm.build import PATCH
from tiny_vlm.document_questions import ASK, TASKS
from tiny_vlm.layouts import LAYOUTS, PAGE_SIZES, Document, draw_document, random_document
from tiny_vlm.llava_build import PATCHES, TOKEN_ID

PREFIX_HEAD = (TOKEN_ID["<s>"], *b"[INST] ")
PREFIX_TAIL = tuple(b"\n")
ANSWER_START = tuple(b" [/INST]")
END = TOKEN_ID["</s>"]
# How often each task is asked where the layout allows it; "all" comes first on a page, if at all.
TASK_WEIGHTS = {"lookup": 0.45, "multi": 0.25, "line": 0.2, "cell": 0.7}
WHOLE_PAGES = 0.5  # share of the pages whose whole text is asked for, where it fits
# Pages and text tokens of a batch by page size: about 37,000 tokens a batch.
# No number of pages, tiles or tokens equals a width of the model: torch.compile would take the two for one symbol.
BATCH = {
    (224, 224): (39, 392),
    (224, 448): (28, 520),
    (448, 224): (28, 520),
    (448, 448): (19, 640),
    (448, 672): (15, 640),
    (672, 448): (15, 640),
    (672, 672): (11, 640),
}


class Stage(NamedTuple):
    """Page sizes, which take turns at random, and options of `random_document`."""

    sizes: tuple[tuple[int, int], ...]
    options: dict[str, Any]


def stage(progress: float) -> Stage:
    """The curriculum at a progress of 0..1: from one tile with large text to nine tiles with all."""
    if progress < 0.05:
        return Stage(((224, 224),), {"layouts": ("list",), "smallest": 18, "most_lines": 3})
    if progress < 0.12:
        return Stage(((224, 224),), {})
    if progress < 0.25:
        return Stage(((224, 448), (448, 224)), {})
    return Stage((*PAGE_SIZES, *PAGE_SIZES, (224, 448), (448, 224)), {"layouts": (*LAYOUTS, "table")})


def prefix_length(height: int, width: int) -> int:
    """Tokens before the question: the downscaled view, and the tiles with a newline token after each row."""
    rows, columns = height // PATCH, width // PATCH
    return len(PREFIX_HEAD) + PATCHES**2 + rows * (columns + 1) + len(PREFIX_TAIL)


def tile_characters(document: Document) -> NDArray[np.uint8]:
    """Characters centered in each patch of the tiles: uint8 (tiles by rows, patches by rows, slots)."""
    grid = character_grid(document)
    rows, columns, slots = grid.shape
    grid = grid.reshape(rows // PATCHES, PATCHES, columns // PATCHES, PATCHES, slots)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, PATCHES**2, slots)


def random_segments(rng: random.Random, document: Document, length: int) -> Iterator[Segment]:
    """Questions about a document, without end; at times first the whole text, where `length` tokens hold it."""
    whole = bool(document.read) and sum(len(line) + 1 for line in document.read) < length - 40
    wanted = ["all"] if whole and rng.random() < WHOLE_PAGES else []
    names, weights = list(TASK_WEIGHTS), list(TASK_WEIGHTS.values())
    while True:
        name = wanted.pop() if wanted else rng.choices(names, weights)[0]
        if asked := ASK[name](rng, document):
            task, question, answer = asked
            yield TASKS.index(task), [*question.encode(), *ANSWER_START], [*answer.encode(), END]


def make_batch(rng: random.Random, progress: float, shrink: int = 1) -> dict[str, Tensor]:
    """One batch of documents of one size: the arrays of `pack`, ink cover, character targets and page looks.

    `shrink` divides the number of documents (at least 2 remain).
    """
    sizes, options = stage(progress)
    height, width = rng.choice(sizes)
    count, length = BATCH[height, width]
    length += -(prefix_length(height, width) + length) % 8  # attention kernels want a mask with rows of a multiple of 8
    documents = [random_document(rng, height, width, **options) for _ in range(max(count // shrink, 2))]
    arrays = [
        pack(random_segments(rng, document, length), length)
        | {"cover": draw_document(document), "characters": tile_characters(document)}
        for document in documents
    ]
    return stack(documents, arrays)
