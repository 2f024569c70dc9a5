"""Synthetic document pages (fields with a key and a value, and lines of words) with questions and exact answers.

A page is described by plain data, drawn with Pillow as an ink mask, then tinted and made noisy. The same description
gives the questions, so every answer is exact. Pillow's built-in font needs no file; the DejaVu fonts come with
matplotlib.
"""

import functools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, ...]
Question = tuple[str, str, str]  # task, question, answer

BUILTIN_FONTS = ("builtin",)
DEJAVU_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
ALL_FONTS = BUILTIN_FONTS + DEJAVU_FONTS
# Height and width in pixels, multiples of 28: 144 to 400 visual tokens.
PAGE_SIZES = ((336, 336), (392, 504), (448, 448), (448, 560), (560, 448), (560, 560), (672, 448))
MARGIN = 10
HELD_OUT_SEED = 20_240_317

KEYS = {
    "Invoice": "number", "Name": "word", "Date": "date", "Total": "price", "City": "word", "Phone": "number",
    "Order": "number", "Code": "code", "Item": "word", "Price": "price", "Status": "word", "Account": "number",
    "Ref": "code", "Batch": "code", "Room": "number", "Seat": "code", "Flight": "code", "Gate": "code",
    "Weight": "price", "Color": "word", "Owner": "word", "Model": "code", "Serial": "number", "Due": "date",
}  # fmt: skip
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # no glyphs that look alike (I, O, 0, 1)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


@dataclass(frozen=True)
class Line:
    """One line of text; all lengths in pixels, `baseline` from the top of the page."""

    text: str
    font: str
    size: int
    left: int
    baseline: int


@dataclass(frozen=True)
class Page:
    """All that a page shows: lines from top to bottom, field values by key, RGB colors."""

    height: int
    width: int
    lines: tuple[Line, ...]
    fields: dict[str, str]
    paper: Color
    ink: Color
    noise: float  # standard deviation, in 0..255 units


class Example(NamedTuple):
    """One test question about one page."""

    task: str
    image: Image.Image
    question: str
    answer: str


@functools.cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font by name and size in pixels; raises ModuleNotFoundError for a DejaVu font without matplotlib."""
    if name in BUILTIN_FONTS:
        return ImageFont.load_default(size=size)
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'font {name!r} comes with matplotlib: pip install "mmshiftkv[plot]", or use {BUILTIN_FONTS[0]!r} alone'
        ) from error
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def advances(name: str, size: int) -> NDArray[np.float64]:
    """Advance width in pixels of each of the 128 ASCII characters."""
    font = load_font(name, size)
    return np.array([font.getlength(chr(code)) if 32 <= code < 127 else 0.0 for code in range(128)])


def char_edges(text: str, font: str, size: int) -> NDArray[np.float64]:
    """Left edge of every character and, last, the right edge of the text (kerning ignored)."""
    codes = np.frombuffer(text.encode("ascii"), np.uint8)
    return np.concatenate([[0.0], np.cumsum(advances(font, size)[codes])])


def random_word(rng: random.Random) -> str:
    """A word of 3 to 7 letters that no dictionary knows; one in five starts with a capital."""
    if rng.random() < 0.3:
        word = "".join(rng.choices(LETTERS, k=rng.randint(3, 7)))
    else:
        word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3)))
        word += rng.choice(CONSONANTS) if rng.random() < 0.5 else ""
    return word.capitalize() if rng.random() < 0.2 else word


def random_value(rng: random.Random, kind: str) -> str:
    """A value of one of the kinds in `KEYS`."""
    if kind == "number":
        return "".join(rng.choices("0123456789", k=rng.randint(4, 8)))
    if kind == "word":
        return random_word(rng)
    if kind == "date":
        return f"{rng.randint(1980, 2039)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    if kind == "price":
        return f"{rng.randint(1, 1999)}.{rng.randint(0, 99):02d}"
    code = "".join(rng.choices(CODE_LETTERS, k=rng.randint(4, 7)))
    return code[:3] + "-" + code[3:] if len(code) > 5 else code


def random_page(
    rng: random.Random,
    height: int,
    width: int,
    max_lines: int = 12,
    min_size: int = 15,
    max_size: int = 28,
    fonts: Sequence[str] = ALL_FONTS,
) -> Page:
    """A page with at least one field; half of the pages use Pillow's built-in font only."""
    while True:
        page = _try_page(rng, height, width, max_lines, min_size, max_size, fonts)
        if page is not None and page.fields:
            return page


class _Text(NamedTuple):
    text: str
    font: str
    size: int
    height: int
    left: int


def _try_page(
    rng: random.Random, height: int, width: int, max_lines: int, min_size: int, max_size: int, fonts: Sequence[str]
) -> Page | None:
    """One attempt; None when a text does not fit even at the smallest size."""
    if "builtin" in fonts and rng.random() < 0.5:
        fonts = BUILTIN_FONTS
    line_count = rng.randint(min(3, max_lines), max_lines) if max_lines > 3 else rng.randint(1, max_lines)
    is_field = [rng.random() < 0.65 for _ in range(line_count)]
    keys = rng.sample(list(KEYS), line_count)

    space, available = height - 2 * MARGIN, width - 2 * MARGIN
    texts: list[_Text] = []
    fields: dict[str, str] = {}
    for key, keyed in zip(keys, is_field, strict=True):
        font, size = rng.choice(fonts), rng.randint(min_size, max_size)
        value = random_value(rng, KEYS[key])
        text = f"{key}: {value}" if keyed else " ".join(random_word(rng) for _ in range(rng.randint(1, 4)))
        while (text_width := char_edges(text, font, size)[-1]) > available:
            if size > min_size:
                size -= 1
            elif keyed or " " not in text:
                return None
            else:
                text = text.rsplit(" ", 1)[0]
        line_height = int(1.4 * size) + 1
        if line_height > space:
            break
        space -= line_height
        if keyed:
            fields[key] = value
        texts.append(_Text(text, font, size, line_height, MARGIN + rng.randint(0, int(available - text_width))))

    lines = _spread(rng, texts, space)
    paper = tuple(rng.randint(215, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 89) for _ in range(3))
    return Page(height, width, lines, fields, paper, ink, rng.uniform(0, 8))


def _spread(rng: random.Random, texts: Sequence[_Text], space: int) -> tuple[Line, ...]:
    """Places the texts below one another, with gaps that take at most `space` pixels together."""
    lines, top, gone = [], MARGIN, 0
    for gap, line in zip(sorted(rng.randint(0, space) for _ in texts), texts, strict=True):
        top, gone = top + gap - gone, gap
        lines.append(Line(line.text, line.font, line.size, line.left, top + int(1.05 * line.size)))
        top += line.height
    return tuple(lines)


def draw_ink(page: Page) -> NDArray[np.uint8]:
    """Ink coverage of the page, uint8 (height, width)."""
    canvas = Image.new("L", (page.width, page.height))
    draw = ImageDraw.Draw(canvas)
    for line in page.lines:
        draw.text((line.left, line.baseline), line.text, fill=255, font=load_font(line.font, line.size), anchor="ls")
    return np.asarray(canvas)


def page_image(page: Page, seed: int | Sequence[int]) -> Image.Image:
    """The page as an RGB image; `seed` is that of the noise."""
    return tinted_image(page, draw_ink(page), seed)


def tinted_image(page: Page, ink: NDArray[np.uint8], seed: int | Sequence[int]) -> Image.Image:
    """The ink coverage `ink` in the page's colors and with its noise, an RGB image."""
    cover = ink[..., None] / 255.0
    pixels = np.array(page.paper) * (1 - cover) + np.array(page.ink) * cover
    pixels += page.noise * np.random.default_rng(seed).standard_normal(pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def field_question(page: Page, keys: Sequence[str]) -> Question:
    """Asks for the values of one field (task "lookup") or of several (task "multi")."""
    if len(keys) == 1:
        return "lookup", f"What is the {keys[0]}?", page.fields[keys[0]]
    question = "What are the " + ", the ".join(keys[:-1]) + f" and the {keys[-1]}?"
    return "multi", question, "; ".join(page.fields[key] for key in keys)


def ask_lookup(rng: random.Random, page: Page) -> Question:
    """The value of one field."""
    return field_question(page, [rng.choice(list(page.fields))])


def ask_multi(rng: random.Random, page: Page) -> Question:
    """Two or three fields at once; a page with a single field gets a lookup question instead."""
    if len(page.fields) < 2:
        return ask_lookup(rng, page)
    return field_question(page, rng.sample(list(page.fields), min(len(page.fields), rng.randint(2, 3))))


def ask_line(rng: random.Random, page: Page) -> Question:
    """The text of one line, counted from the top."""
    number = rng.randrange(len(page.lines))
    return "line", f"Read line {number + 1}.", page.lines[number].text


def ask_all(rng: random.Random, page: Page) -> Question:
    """The text of the page, one line below the other."""
    return "all", "Read all the text.", "\n".join(line.text for line in page.lines)


ASK: dict[str, Callable[[random.Random, Page], Question]] = {
    "lookup": ask_lookup,
    "multi": ask_multi,
    "line": ask_line,
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
    rng = random.Random(f"{seed}-{index}")
    wanted = TASKS[index % len(TASKS)]
    height, width = PAGE_SIZES[index // len(TASKS) % len(PAGE_SIZES)]
    while True:
        page = random_page(rng, height, width, fonts=fonts)
        task, question, answer = ASK[wanted](rng, page)
        if task == wanted:
            return Example(task, page_image(page, [seed, index]), question, answer)
