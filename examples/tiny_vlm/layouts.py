"""The second model's pages: lists, forms with boxes, tables with rows and columns, and receipts.

Each layout fills a `Document`, a page that also knows its boxes, its table cells and the lines that a
reader would read.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tiny_vlm.pages import (
    ALL_FONTS,
    BUILTIN_FONTS,
    KEYS,
    MARGIN,
    Line,
    Page,
    char_edges,
    draw_ink,
    random_page,
    random_value,
    random_word,
    tinted_image,
)

# Height and width in pixels; together with the downscaled view 1,312 to 2,608 visual tokens.
PAGE_SIZES = ((448, 448), (448, 672), (672, 448), (672, 672))
COLUMN_NAMES = ("Total", "Price", "Count", "Tax", "Net", "Cost", "Size", "Stock", "Sales", "Share", "Rate", "Limit")
ROW_NAMES = tuple(key for key in KEYS if key not in COLUMN_NAMES)
LINE_HEIGHT = 1.4  # times the size of the text
CELL_SPACE = 12  # least pixels between the texts of two columns


@dataclass(frozen=True)
class Box:
    """The outline of a rectangle, in pixels; a straight line where two of its sides meet."""

    left: int
    top: int
    right: int
    bottom: int
    cover: int  # of the ink, 0..255


@dataclass(frozen=True)
class Document(Page):
    """A page whose layout is known. `lines` holds a line for each piece of text, wherever it stands."""

    boxes: tuple[Box, ...] = ()
    cells: tuple[tuple[tuple[str, str], str], ...] = ()  # ((row, column), text)
    read: tuple[str, ...] = ()  # lines to be read from top to bottom; empty where their order is open

    @property
    def cell_texts(self) -> dict[tuple[str, str], str]:
        """The text of each cell, by the names of its row and column."""
        return dict(self.cells)


@dataclass
class Draft:
    """A document that is being laid out."""

    rng: random.Random
    height: int
    width: int
    font: str
    smallest: int
    largest: int
    most_lines: int

    def __post_init__(self) -> None:
        """Starts with nothing on the page."""
        self.lines: list[Line] = []
        self.boxes: list[Box] = []
        self.fields: dict[str, str] = {}
        self.cells: dict[tuple[str, str], str] = {}
        self.read: list[str] = []
        self.cover = self.rng.randint(90, 255)

    def text_width(self, text: str, size: int) -> int:
        """Pixels, rounded up."""
        return int(np.ceil(char_edges(text, self.font, size)[-1]))

    def write(self, text: str, size: int, left: int, top: int) -> None:
        """Puts a text on the page; `top` is that of a line of LINE_HEIGHT."""
        self.lines.append(Line(text, self.font, size, left, top + int(1.05 * size)))

    def frame(self, left: int, top: int, right: int, bottom: int) -> None:
        """Puts a box, or a straight line, on the page."""
        self.boxes.append(Box(left, top, right, bottom, self.cover))

    def document(self) -> Document:
        """The finished page, in random colors; its lines run from top to bottom."""
        rng = self.rng
        return Document(
            self.height,
            self.width,
            tuple(sorted(self.lines, key=lambda line: (line.baseline, line.left))),
            self.fields,
            tuple(rng.randint(215, 255) for _ in range(3)),
            tuple(rng.randint(0, 89) for _ in range(3)),
            rng.uniform(0, 8),
            tuple(self.boxes),
            tuple(self.cells.items()),
            tuple(self.read),
        )


def line_pixels(size: int) -> int:
    """The height of a line of text of this size."""
    return int(LINE_HEIGHT * size) + 1


def fill_list(draft: Draft) -> bool:
    """Fields and lines of words, as on the first model's pages, each in a font and a size of its own."""
    page = random_page(
        draft.rng,
        draft.height,
        draft.width,
        max_lines=min(draft.most_lines, draft.height // 40),
        min_size=draft.smallest,
        max_size=draft.largest,
        fonts=ALL_FONTS if draft.font not in BUILTIN_FONTS else BUILTIN_FONTS,
    )
    draft.lines, draft.fields = list(page.lines), page.fields
    draft.read = [line.text for line in page.lines]
    return True


def fill_form(draft: Draft) -> bool:
    """Named boxes in one or more columns; the name stands above its box, in it, or to its left."""
    rng = draft.rng
    style = rng.choice(("above", "inside", "left"))
    name_size = rng.randint(draft.smallest, min(draft.smallest + 4, draft.largest))
    value_size = rng.randint(draft.smallest, min(draft.largest, 24))
    least = 210 if style == "left" else 130
    columns = rng.randint(1, max(1, (draft.width - 2 * MARGIN) // least))
    pitch = (draft.width - 2 * MARGIN) // columns
    lines = [value_size] if style == "left" else [name_size, value_size]
    slot = sum(line_pixels(size) for size in lines) + 12
    rows = (draft.height - 2 * MARGIN) // slot
    if not rows:
        return False
    places = [(row, column) for row in range(rows) for column in range(columns)]
    most = min(len(places), len(KEYS))
    chosen = sorted(rng.sample(places, rng.randint(max(1, most // 2), most)))
    spare = (draft.height - 2 * MARGIN - rows * slot) // max(rows, 1)
    for (row, column), key in zip(chosen, rng.sample(list(KEYS), len(chosen)), strict=True):
        left, top = MARGIN + column * pitch, MARGIN + row * (slot + spare)
        value = random_value(rng, KEYS[key])
        if not _form_field(draft, style, key, value, (name_size, value_size), left, top, pitch - 8):
            return False
        draft.fields[key] = value
    return True


def _form_field(
    draft: Draft, style: str, key: str, value: str, sizes: tuple[int, int], left: int, top: int, width: int
) -> bool:
    """One named box at this place; False when it does not hold the value."""
    name_size, value_size = sizes
    right = left + width
    if style == "left":
        name_size = value_size
        box_left, box_top = left + draft.text_width("Account:", name_size) + 6, top
        value_top = top + 3
        draft.write(f"{key}:", name_size, left, value_top)
    else:
        box_left, box_top = left, top if style == "inside" else top + line_pixels(name_size)
        value_top = top + line_pixels(name_size) + 2
        draft.write(key, name_size, left + (4 if style == "inside" else 0), top + 1)
    bottom = value_top + line_pixels(value_size) + 2
    room = right - box_left - 12 - draft.text_width(value, value_size)
    if room < 0:
        return False
    draft.frame(box_left, box_top, right, bottom)
    draft.write(value, value_size, box_left + 6 + draft.rng.randint(0, min(room, 24)), value_top)
    return True


def fill_table(draft: Draft) -> bool:
    """Fields as a caption, then a table with named rows and columns, with all rules, some or none."""
    rng = draft.rng
    size = rng.randint(draft.smallest, min(draft.largest, 22))
    pitch = line_pixels(size) + rng.randint(0, 8)
    top = _caption(draft, size)
    names = [name for name in ROW_NAMES if name not in draft.fields]
    most_rows = min((draft.height - MARGIN - top) // pitch - 1, len(names), 12)
    if most_rows < 2:
        return False
    rows = rng.sample(names, rng.randint(2, most_rows))
    columns = rng.sample(COLUMN_NAMES, rng.randint(2, 5))
    kinds = {column: rng.choice(("price", "number", "count", "code")) for column in columns}
    texts = [["", *columns]] + [[row, *(_cell_text(rng, kinds[column]) for column in columns)] for row in rows]
    widths = [max(draft.text_width(row[place], size) for row in texts) + CELL_SPACE for place in range(len(texts[0]))]
    spare = draft.width - 2 * MARGIN - sum(widths)
    if spare < 0:
        return False
    widths = [width + rng.randint(0, spare // len(widths)) for width in widths]
    edges = (MARGIN + np.cumsum([0, *widths])).tolist()
    to_the_right = rng.random() < 0.5
    for number, row in enumerate(texts):
        for place, text in enumerate(row):
            room = widths[place] - CELL_SPACE - draft.text_width(text, size) if to_the_right and place else 0
            if text:
                draft.write(text, size, edges[place] + CELL_SPACE // 2 + room, top + number * pitch)
        if number:
            draft.cells |= {(row[0], column): text for column, text in zip(columns, row[1:], strict=True)}
    _rules(draft, edges, top, pitch, len(texts))
    return True


def _caption(draft: Draft, size: int) -> int:
    """Up to three fields below one another; returns where the table may begin."""
    top = MARGIN
    for key in draft.rng.sample(ROW_NAMES, draft.rng.randint(0, min(3, draft.height // 150))):
        draft.fields[key] = random_value(draft.rng, KEYS[key])
        draft.write(f"{key}: {draft.fields[key]}", size, MARGIN, top)
        top += line_pixels(size)
    return top + draft.rng.randint(4, 16)


def _cell_text(rng: random.Random, kind: str) -> str:
    return str(rng.randint(0, 999)) if kind == "count" else random_value(rng, kind)


def _rules(draft: Draft, edges: Sequence[int], top: int, pitch: int, rows: int) -> None:
    """Lines between the rows and columns, below the names of the columns alone, or none."""
    style = draft.rng.choice(("all", "rows", "head", "none"))
    left, right, bottom = edges[0], edges[-1], top + rows * pitch
    at = {"all": range(rows + 1), "rows": range(rows + 1), "head": (1,), "none": ()}[style]
    for number in at:
        draft.frame(left, top + number * pitch - 2, right, top + number * pitch - 2)
    if style == "all":
        for edge in edges:
            draft.frame(edge, top - 2, edge, bottom - 2)


def fill_receipt(draft: Draft) -> bool:
    """A narrow column of lines: words on top, then names on its left and values on its right side."""
    rng = draft.rng
    size = rng.randint(draft.smallest, min(draft.largest, 24))
    pitch = line_pixels(size) + rng.randint(0, 6)
    most = (draft.height - 2 * MARGIN) // pitch
    width = min(draft.width - 2 * MARGIN, 16 * size + rng.randint(0, 60))
    left = MARGIN + rng.randint(0, draft.width - 2 * MARGIN - width)
    count = rng.randint(min(2, most), min(most, draft.most_lines))
    top = MARGIN + rng.randint(0, draft.height - 2 * MARGIN - count * pitch)
    heads = rng.randint(0, min(2, count - 1))
    keys = rng.sample(list(KEYS), count - heads)
    for number in range(count):
        place = top + number * pitch
        if number < heads:
            words = f"{random_word(rng)} {random_word(rng)}"
            room = width - draft.text_width(words, size)
            draft.write(words, size, left + max(0, room // 2), place)
            draft.read.append(words)
        else:
            key = keys[number - heads]
            value = random_value(rng, KEYS[key] if rng.random() < 0.5 else "price")
            room = width - draft.text_width(value, size)
            if room < draft.text_width(key, size) + CELL_SPACE:
                return False
            draft.write(key, size, left, place)
            draft.write(value, size, left + room, place)
            draft.fields[key] = value
            draft.read.append(f"{key} {value}")
    if heads and rng.random() < 0.5:
        draft.frame(left, top + heads * pitch - 2, left + width, top + heads * pitch - 2)
    return max(line.left + draft.text_width(line.text, size) for line in draft.lines) <= draft.width - MARGIN


FILL: dict[str, Callable[[Draft], bool]] = {
    "list": fill_list,
    "form": fill_form,
    "table": fill_table,
    "receipt": fill_receipt,
}
LAYOUTS = tuple(FILL)


def random_document(
    rng: random.Random,
    height: int,
    width: int,
    layouts: Sequence[str] = LAYOUTS,
    smallest: int = 15,
    largest: int = 28,
    most_lines: int = 16,
    fonts: Sequence[str] = ALL_FONTS,
) -> Document:
    """A document in one of the layouts, with text of `smallest` to `largest` pixels; at least a field or a table.

    `most_lines` holds for lists and receipts, which can be read line by line.
    """
    layout = rng.choice(layouts)
    while True:
        some = BUILTIN_FONTS if "builtin" in fonts and rng.random() < 0.5 else fonts
        draft = Draft(rng, height, width, rng.choice(some), smallest, largest, most_lines)
        if FILL[layout](draft) and (draft.fields or draft.cells):
            return draft.document()


def draw_document(document: Document) -> NDArray[np.uint8]:
    """Ink coverage of the text and the boxes, uint8 (height, width)."""
    canvas = Image.fromarray(draw_ink(document))
    draw = ImageDraw.Draw(canvas)
    for box in document.boxes:
        draw.rectangle((box.left, box.top, box.right, box.bottom), outline=box.cover)
    return np.asarray(canvas)


def document_image(document: Document, seed: int | Sequence[int]) -> Image.Image:
    """The document as an RGB image; `seed` is that of the noise."""
    return tinted_image(document, draw_document(document), seed)
