"""Questions about the second model's documents, with exact answers, and its test set."""

import random
from collections.abc import Callable, Iterator, Sequence

from tiny_vlm.layouts import LAYOUTS, PAGE_SIZES, Document, document_image, random_document
from tiny_vlm.pages import ALL_FONTS, HELD_OUT_SEED, Example, Question, field_question

# Where a task can be asked.
LAYOUTS_OF_TASK = {
    "lookup": LAYOUTS,
    "multi": ("list", "form", "receipt"),
    "line": ("list", "receipt"),
    "cell": ("table",),
    "all": ("list", "receipt"),
}


def ask_lookup(rng: random.Random, document: Document) -> Question | None:
    """The value of one field."""
    return field_question(document, [rng.choice(list(document.fields))]) if document.fields else None


def ask_multi(rng: random.Random, document: Document) -> Question | None:
    """Two or three fields at once."""
    if len(document.fields) < 2:
        return None
    return field_question(document, rng.sample(list(document.fields), min(len(document.fields), rng.randint(2, 3))))


def ask_line(rng: random.Random, document: Document) -> Question | None:
    """The text of one line, counted from the top."""
    if not document.read:
        return None
    number = rng.randrange(len(document.read))
    return "line", f"Read line {number + 1}.", document.read[number]


def ask_cell(rng: random.Random, document: Document) -> Question | None:
    """The text of one cell of a table."""
    if not document.cells:
        return None
    (row, column), text = rng.choice(document.cells)
    return "cell", f"What is in row {row}, column {column}?", text


def ask_all(rng: random.Random, document: Document) -> Question | None:
    """The text of the page, one line below the other."""
    return ("all", "Read all the text.", "\n".join(document.read)) if document.read else None


ASK: dict[str, Callable[[random.Random, Document], Question | None]] = {
    "lookup": ask_lookup,
    "multi": ask_multi,
    "line": ask_line,
    "cell": ask_cell,
    "all": ask_all,
}
TASKS = tuple(ASK)


def held_out_examples(count: int, seed: int = HELD_OUT_SEED, fonts: Sequence[str] = ALL_FONTS) -> Iterator[Example]:
    """Reproducible test examples: tasks take turns, and page sizes after each round of tasks."""
    for index in range(count):
        yield _held_out_example(index, seed, fonts)


def held_out_of_task(
    task: str, count: int, seed: int = HELD_OUT_SEED, fonts: Sequence[str] = ALL_FONTS
) -> Iterator[Example]:
    """The first `count` examples of one task among `held_out_examples`."""
    first = TASKS.index(task)
    for index in range(first, first + count * len(TASKS), len(TASKS)):
        yield _held_out_example(index, seed, fonts)


def _held_out_example(index: int, seed: int, fonts: Sequence[str]) -> Example:
    rng = random.Random(f"documents-{seed}-{index}")
    task = TASKS[index % len(TASKS)]
    height, width = PAGE_SIZES[index // len(TASKS) % len(PAGE_SIZES)]
    while True:
        document = random_document(rng, height, width, LAYOUTS_OF_TASK[task], fonts=fonts)
        if asked := ASK[task](rng, document):
            return Example(task, document_image(document, [seed, index]), *asked[1:])
