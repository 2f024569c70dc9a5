"""Training batches: pages of one size, each with several independent question-answer segments."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiny_vlm.build import CELL, MERGE, PATCH, TOKEN_ID
from tiny_vlm.pages import ASK, PAGE_SIZES, TASKS, Page, char_edges, draw_ink, random_page

IGNORE = -100
SMALL_SIZES = ((224, 336), (280, 280))
CHARS_PER_PATCH = 3  # slots of the training-only character head; a 14-pixel patch rarely holds more character centers
SYSTEM = b"system\nYou are a helpful assistant."
START, END, VISION_START, VISION_END, IMAGE = (
    TOKEN_ID[f"<|{name}|>"] for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad")
)
NEWLINE = ord("\n")
PREFIX_HEAD = (START, *SYSTEM, END, NEWLINE, START, *b"user\n", VISION_START)
ANSWER_START = (END, NEWLINE, START, *b"assistant\n")


class Progress(Protocol):
    """How far the training is, 0..1; the training process moves `value` while the batch workers read it."""

    value: float


def stages(progress: float) -> tuple[tuple[tuple[int, int], ...], dict[str, Any], int, int]:
    """Curriculum: (page sizes, page options, images, text tokens) at a progress of 0..1.

    No number of images equals a width of the model: torch.compile would take the two for one symbol.
    """
    if progress < 0.06:
        return ((112, 224), (140, 280)), {"max_lines": 2, "min_size": 18}, 240, 128
    if progress < 0.18:
        return SMALL_SIZES, {"max_lines": 5, "min_size": 16}, 120, 256
    return PAGE_SIZES + SMALL_SIZES, {}, 64, 384


def character_grid(page: Page) -> NDArray[np.uint8]:
    """Characters centered in each patch, in reading order: uint8 (rows of patches, columns of patches, slots)."""
    rows, columns = page.height // PATCH, page.width // PATCH
    grid = np.zeros((rows, columns, CHARS_PER_PATCH), np.uint8)
    used = np.zeros((rows, columns), np.int64)
    for line in page.lines:
        edges = line.left + char_edges(line.text, line.font, line.size)
        row = int(line.baseline - 0.33 * line.size) // PATCH
        places = ((edges[:-1] + edges[1:]) / 2 // PATCH).astype(int)
        for char, column in zip(line.text.encode(), places, strict=True):
            if char != ord(" ") and used[row, column] < CHARS_PER_PATCH:
                grid[row, column, used[row, column]] = char
                used[row, column] += 1
    return grid


def character_targets(page: Page) -> NDArray[np.uint8]:
    """The `character_grid` of a page: uint8 (patches in the processor's order, slots)."""
    grid = character_grid(page)
    rows, columns, slots = grid.shape
    grid = grid.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, slots)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * columns, slots)


Segment = tuple[int, list[int], list[int]]  # index of the task, tokens of the question, tokens of the answer


def pack(segments: Iterator[Segment], length: int) -> dict[str, NDArray[np.int64]]:
    """As many segments as fit, one after another, up to the first that does not; each array has shape (length,).

    `inputs` are tokens, `targets` the answers' next tokens (IGNORE elsewhere), `offsets` positions within a segment,
    `segments` segment numbers (-1 where there is none), `tasks` indices into the model's tasks.
    """
    packed = {name: np.zeros(length, np.int64) for name in ("inputs", "targets", "offsets", "segments", "tasks")}
    packed["targets"][:] = IGNORE
    packed["segments"][:] = -1
    at = 0
    for number, (task, question, answer) in enumerate(segments):
        tokens = np.array([*question, *answer])
        size = len(tokens) - 1
        if at + size > length:
            break
        here = slice(at, at + size)
        packed["inputs"][here] = tokens[:-1]
        packed["targets"][at + len(question) - 1 : at + size] = answer
        packed["offsets"][here] = np.arange(size)
        packed["segments"][here] = number
        packed["tasks"][here] = task
        at += size
    return packed


def random_segments(rng: random.Random, page: Page, length: int) -> Iterator[Segment]:
    """Questions about a page, without end; at times it starts with the whole text, where `length` tokens hold it."""
    wanted = ["all"] if rng.random() < 0.6 and sum(len(line.text) + 1 for line in page.lines) < length - 40 else []
    while True:
        name = wanted.pop() if wanted else rng.choices(("lookup", "multi", "line"), (0.45, 0.25, 0.3))[0]
        task, question, answer = ASK[name](rng, page)
        yield TASKS.index(task), [*question.encode(), *ANSWER_START], [*answer.encode(), END]


def pack_segments(rng: random.Random, page: Page, length: int) -> dict[str, NDArray[np.int64]]:
    """As many question-answer segments about a page as fit; the arrays of `pack`."""
    return pack(random_segments(rng, page, length), length)


def stack(pages: Sequence[Page], arrays: Sequence[dict[str, NDArray[Any]]]) -> dict[str, Tensor]:
    """A batch of the arrays of each page, and the looks of the pages."""
    batch: dict[str, NDArray[Any]] = {name: np.stack([page[name] for page in arrays]) for name in arrays[0]}
    for name in ("paper", "ink", "noise"):
        batch[name] = np.array([getattr(page, name) for page in pages], np.float32)
    return {name: torch.from_numpy(value) for name, value in batch.items()}


def make_batch(rng: random.Random, progress: float, shrink: int = 1) -> dict[str, Tensor]:
    """One batch of pages of one size: the arrays of `pack_segments`, ink cover, character targets and page looks.

    `shrink` divides the number of images (at least 2 remain).
    """
    sizes, options, images, length = stages(progress)
    height, width = rng.choice(sizes)
    prefix = len(PREFIX_HEAD) + (height // CELL) * (width // CELL) + 1
    length += -(prefix + length) % 8  # attention kernels want a mask with rows of a multiple of 8
    pages = [random_page(rng, height, width, **options) for _ in range(max(images // shrink, 2))]
    arrays = [
        pack_segments(rng, page, length) | {"cover": draw_ink(page), "characters": character_targets(page)}
        for page in pages
    ]
    return stack(pages, arrays)


MakeBatch = Callable[[random.Random, float, int], dict[str, Tensor]]  # of random source, progress and shrink


class Batches(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """An endless stream of batches, another one in each worker process."""

    def __init__(self, make: MakeBatch, seed: str, progress: Progress, shrink: int) -> None:
        """Each pair of seed and worker has its own pages; `make` draws a batch, and takes `shrink`."""
        self.make, self.seed, self.progress, self.shrink = make, seed, progress, shrink

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches of the curriculum's present stage, without end."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            torch.set_num_threads(1)
        rng = random.Random(f"{self.seed}-{worker.id if worker else 0}")
        while True:
            yield self.make(rng, self.progress.value, self.shrink)
