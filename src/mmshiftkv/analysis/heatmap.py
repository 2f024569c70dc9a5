"""Draws which tokens of an image prompt a cache keeps: heat maps over the image, and the text coloured alike."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..checks import check_integer
from .figures import new_figure
from .visual_tokens import TokenGrid, VisualTokenMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from PIL.Image import Image

COLORS, _DARKEST_COLOR = "YlOrRd", 0.82  # dark print must be legible on the darkest colour
_DARKEST = 0.3  # grey that black becomes under the colours: they must show on dark pictures as well
_MOST_PIXELS = 1000  # of a picture's longer side, as drawn

# All lengths in inches; everything is placed by hand, as the text must be broken into lines of a known width.  Letters
# are large beside the pictures, to be read where three maps share a page.
_PANEL = 3.4  # longer side of a picture
_LEAST_SIDE, _LEAST_BLOCK = 1.1, 2.7
_GAP, _CAPTION, _BAR = 0.2, 0.25, 0.14
_TITLE_LINE, _HEADING_LINE, _LINE = 0.2, 0.185, 0.165
_NUMBERS, _BAR_LINE = 0.38, 0.155  # right of the colour bar: its numbers, and a line of its label
_TITLE_SIZE, _HEADING_SIZE, _FONT_SIZE, _BAR_SIZE = (
    10.5,
    9.5,
    7.5,
    8.5,
)  # points; _FONT_SIZE is that of the prompt's text
_CHARACTER = 0.63 * _FONT_SIZE / 72  # a little more than DejaVu Sans Mono's advance
_NEWLINE_STRIP = 0.04  # of the picture's width: the strip for the tokens that end rows, and the gap before it

_CAPTIONS = {"crops": "crops (right: row ends)"}


@dataclass(frozen=True)
class _Word:
    """A piece of the prompt's text in its line; `count` is None for what stands for visual tokens."""

    text: str
    line: int
    start: int
    count: int | None


@dataclass(frozen=True)
class _Heading:
    """A line above a picture."""

    text: str
    weight: str


def draw_heatmap(
    maps: VisualTokenMap | Mapping[str, VisualTokenMap],
    picture: "Image",
    *,
    tokenizer: Any = None,
    title: str | None = None,
    text_lines: int = 24,
) -> "Figure":
    """The picture with its visual tokens coloured by how many heads keep them, and the prompt's text below it.

    Where no head keeps a token there is no colour.  Several maps stand side by side, with the same colours.

    Args:
        maps: one map, or several of the same prompt by name, such as that of the method.  A name may have several
            lines, of which the first one is bold.
        picture: the image that the tokens show.
        tokenizer: writes the text tokens below the picture; None: they are left out.
        title: above everything; may have several lines.
        text_lines: at most so many last lines of the text are shown.

    Returns:
        A figure without global state: `figure.savefig(path, dpi=150)` writes it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
        ValueError: `maps` is empty, or they are not of the same image and layers.
    """
    check_integer("text_lines", text_lines, minimum=1)
    named = {"": maps} if isinstance(maps, VisualTokenMap) else dict(maps)
    if not named:
        raise ValueError("maps is empty: at least one is needed")
    kinds = {
        (token_map.layers, token_map.pairs, *(grid.counts.shape for grid in token_map.grids)): name
        for name, token_map in named.items()
    }
    if len(kinds) > 1:
        raise ValueError(f"maps: {' and '.join(map(repr, kinds.values()))} are not of the same image and layers")
    figure = new_figure(1, 1, layout=None)
    layout = _Layout.of(named, picture, tokenizer, title, text_lines)
    figure.set_size_inches(layout.width, layout.height)
    if title:
        place = _GAP / layout.width, 1 - 0.5 * _GAP / layout.height
        spacing = _TITLE_LINE / (_TITLE_SIZE / 72)
        figure.text(*place, layout.title, va="top", fontsize=_TITLE_SIZE, linespacing=spacing, parse_math=False)
    colors = _color_scale(list(named.values()))
    for number, token_map in enumerate(named.values()):
        _draw_map(figure, layout, number, token_map, picture, colors)
    _draw_color_bar(figure, layout, layout.left(len(named)), colors)
    return figure


@dataclass(frozen=True)
class _Layout:
    """Where things go, in inches from the lower left corner."""

    panel_width: float
    panel_height: float
    block_width: float
    headings: tuple[list[_Heading], ...]
    words: tuple[list[_Word], ...]
    lines: int
    panel_bottom: float
    title: str
    bar_label: str
    width: float
    height: float

    @classmethod
    def of(
        cls, named: Mapping[str, VisualTokenMap], picture: "Image", tokenizer: Any, title: str | None, text_lines: int
    ) -> "_Layout":
        scale = _PANEL / max(picture.size)
        panel_width, panel_height = (max(_LEAST_SIDE, side * scale) for side in picture.size)
        first = next(iter(named.values()))
        panels = len(first.grids)
        strip = 2 * _NEWLINE_STRIP * panel_width if panels > 1 else 0
        block_width = max(panels * panel_width + (panels - 1) * _GAP + strip, _LEAST_BLOCK)
        bar_label = _bar_label(first, panel_height)
        right = _BAR + _NUMBERS + _BAR_LINE * (bar_label.count("\n") + 1)
        width = len(named) * (block_width + _GAP) + _GAP + right
        words: tuple[list[_Word], ...] = ()
        if tokenizer is not None:
            characters = int(block_width / _CHARACTER)
            words = tuple(_words(token_map, tokenizer, characters, text_lines) for token_map in named.values())
        lines = max((word.line + 1 for block in words for word in block), default=0)
        title_lines = [
            line
            for part in (title or "").splitlines()
            for line in _wrapped(part, width - 2 * _GAP, _TITLE_SIZE, max_lines=5)
        ]
        headings = tuple(_headings(name, token_map, block_width) for name, token_map in named.items())
        title_height = _TITLE_LINE * len(title_lines) + 0.1 if title_lines else 0
        above = title_height + max(map(len, headings)) * _HEADING_LINE + _GAP
        panel_bottom = 1.5 * _GAP + lines * _LINE + (_CAPTION if panels > 1 else 0)
        height = panel_bottom + panel_height + above
        title = "\n".join(title_lines)
        sizes = panel_width, panel_height, block_width
        return cls(*sizes, headings, words, lines, panel_bottom, title, bar_label, width, height)

    @property
    def text_bottom(self) -> float:
        return 0.75 * _GAP

    def left(self, number: int) -> float:
        """Left edge of one map's block."""
        return _GAP + number * (self.block_width + _GAP)

    def axes(self, figure: "Figure", left: float, bottom: float, width: float, height: float) -> "Axes":
        """Axes at a place in inches."""
        return figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))


def _color_scale(maps: Sequence[VisualTokenMap]) -> "ScalarMappable":
    """From counts of at least 1 to colours, one for each count; the largest count of all maps is the darkest."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    largest = max(1, *(int(part.max()) for token_map in maps for part in _all_counts(token_map)))
    colors = ListedColormap(colormaps[COLORS](np.linspace(0, _DARKEST_COLOR, largest + 1)[1:]))
    return ScalarMappable(Normalize(0.5, largest + 0.5), colors)


def _all_counts(token_map: VisualTokenMap) -> list[torch.Tensor]:
    parts = [grid.counts for grid in token_map.grids]
    parts += [grid.newline_counts for grid in token_map.grids if grid.newline_counts is not None]
    return [part for part in [*parts, token_map.text_counts] if part.numel()]


def _draw_map(
    figure: "Figure",
    layout: _Layout,
    number: int,
    token_map: VisualTokenMap,
    picture: "Image",
    colors: "ScalarMappable",
) -> None:
    """One map's heading, pictures and text."""
    left = layout.left(number)
    top = layout.panel_bottom + layout.panel_height + 0.07 + max(map(len, layout.headings)) * _HEADING_LINE
    for line, heading in enumerate(layout.headings[number]):
        figure.text(
            left / layout.width,
            (top - line * _HEADING_LINE) / layout.height,
            heading.text,
            va="top",
            fontsize=_HEADING_SIZE,
            weight=heading.weight,
            parse_math=False,
        )
    for place, grid in enumerate(token_map.grids):
        strip = 2 * _NEWLINE_STRIP if grid.newline_counts is not None else 0
        start = left + place * (layout.panel_width + _GAP)
        axes = layout.axes(figure, start, layout.panel_bottom, layout.panel_width * (1 + strip), layout.panel_height)
        _draw_grid(axes, grid, picture, colors)
        axes.set(xlim=(0, 1 + strip), ylim=(1, 0))
        if len(token_map.grids) > 1:
            figure.text(
                start / layout.width,
                (layout.panel_bottom - 0.06) / layout.height,
                _CAPTIONS.get(grid.name, grid.name),
                va="top",
                fontsize=8,
            )
    if layout.words:
        axes = layout.axes(figure, left, layout.text_bottom, layout.block_width, layout.lines * _LINE)
        _draw_words(axes, layout, layout.words[number], colors)


def _headings(name: str, token_map: VisualTokenMap, width: float) -> list[_Heading]:
    """The lines of a map's name and below them how much of what is kept is visual."""
    lines = []
    for number, part in enumerate(name.splitlines()):
        weight = "normal" if number else "bold"
        lines += [_Heading(line, weight) for line in _wrapped(part, width, _HEADING_SIZE, max_lines=2, weight=weight)]
    return [*lines, _Heading(f"{100 * token_map.visual_share:.0f} % of the kept tokens are visual", "normal")]


def _wrapped(text: str, width: float, size: float, max_lines: int, weight: str = "normal") -> list[str]:
    """The text in at most so many lines that take at most `width` inches in letters of `size` points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)

    def inches(line: str) -> float:
        return text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] / 72

    lines: list[str] = []
    shown = _visible(text)
    average = max(inches(shown), 0.01) / max(len(shown), 1)
    for characters in range(max(16, int(1.5 * width / average)), 8, -1):
        lines = textwrap.wrap(shown, characters, max_lines=max_lines, placeholder=" ...")
        if all(1.05 * inches(line) <= width for line in lines):  # letters drawn in pixels are a little wider
            break
    return lines


def _draw_grid(axes: "Axes", grid: TokenGrid, picture: "Image", colors: "ScalarMappable") -> None:
    """The coloured picture from 0 to 1 on both axes, and right of it the tokens that end rows."""
    from matplotlib.patches import Rectangle

    axes.imshow(_colored(grid, picture, colors), extent=(0, 1, 1, 0), aspect="auto", interpolation="antialiased")
    axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="gray", linewidth=0.5, clip_on=False))
    if grid.newline_counts is not None:
        _, top, _, bottom = grid.extent
        start = 1 + _NEWLINE_STRIP
        extent = (start, start + _NEWLINE_STRIP, bottom, top)
        axes.imshow(_rgb(grid.newline_counts[:, None], colors), extent=extent, aspect="auto", interpolation="nearest")
    axes.set_axis_off()


def _colored(grid: TokenGrid, picture: "Image", colors: "ScalarMappable") -> Any:
    """The picture in shades of the colours of its tokens, and of white where none is kept: (h, w, 3) from 0 to 1."""
    import numpy as np
    from PIL import ImageOps

    gray = ImageOps.autocontrast(picture.convert("L"))
    gray.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    shade = _DARKEST + (1 - _DARKEST) * np.asarray(gray)[..., None] / 255
    left, top, right, bottom = grid.extent
    rows = _cells(gray.height, grid.counts.shape[0], top, bottom)
    cols = _cells(gray.width, grid.counts.shape[1], left, right)
    # One cell of no colour on each side is for pixels beyond the grid.
    padded = torch.nn.functional.pad(grid.counts, (1, 1, 1, 1))
    return shade * _rgb(padded[rows[:, None], cols], colors)


def _cells(pixels: int, cells: int, first: float, last: float) -> torch.Tensor:
    """Which cell of a grid, from 1, each pixel of an edge lies in: (pixels,) int64, 0 or cells + 1 beyond the grid."""
    centers = (torch.arange(pixels) + 0.5) / pixels
    return ((centers - first) / (last - first) * cells).floor().long().add(1).clamp(0, cells + 1)


def _rgb(counts: torch.Tensor, colors: "ScalarMappable") -> Any:
    """(..., 3) colours of counts; white for none."""
    import numpy as np

    values = counts.numpy()
    return np.where(values[..., None] > 0, colors.to_rgba(values)[..., :3], 1.0)


def _words(token_map: VisualTokenMap, tokenizer: Any, characters: int, text_lines: int) -> list[_Word]:
    """The prompt's text in lines of so many characters: a word for each token and for each run of visual tokens."""
    words: list[_Word] = []
    line = start = 0
    expected: int | None = None
    columns, ids, counts = token_map.text_columns, token_map.text_ids, token_map.text_counts
    for column, token, count in zip(columns.tolist(), ids.tolist(), counts.tolist(), strict=True):
        pieces: list[tuple[str, int | None]] = []
        if expected is not None and column != expected:
            pieces.append(("[image]", None))
        expected = column + 1
        text = tokenizer.decode([token])
        pieces.append(((_visible(text) or "\u00b7")[:characters], count))
        for piece, piece_count in pieces:
            if start + len(piece) > characters and start:
                line, start = line + 1, 0
            words.append(_Word(piece, line, start, piece_count))
            start += len(piece)
        if text.endswith("\n"):
            line, start = line + 1, 0
    first = max(0, line + 1 - text_lines)
    return [_Word(word.text, word.line - first, word.start, word.count) for word in words if word.line >= first]


def _visible(text: str) -> str:
    """The text on one line, without characters that have no shape."""
    shown = text.replace("\n", "\u21b5").replace("\t", "\u2192")
    return "".join(character if character.isprintable() else "\u00b7" for character in shown)


def _draw_words(axes: "Axes", layout: _Layout, words: Sequence[_Word], colors: "ScalarMappable") -> None:
    """The text on coloured ground; axes of one unit for a character and for a line."""
    from matplotlib.patches import Rectangle

    for word in words:
        red, green, blue = _rgb(torch.tensor([word.count or 0]), colors)[0].tolist()
        if word.count:
            ground = (red, green, blue)
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axes.add_patch(Rectangle((word.start, word.line + 0.06), len(word.text), 0.88, color=ground, linewidth=0))
        else:
            ink = "gray"
        axes.text(
            word.start + len(word.text) / 2,
            word.line + 0.5,
            word.text,
            ha="center",
            va="center_baseline",
            color=ink,
            fontsize=_FONT_SIZE,
            family="DejaVu Sans Mono",
            style="italic" if word.count is None else "normal",
            parse_math=False,
        )
    axes.set(xlim=(0, layout.block_width / _CHARACTER), ylim=(layout.lines, 0))
    axes.set_axis_off()


def _bar_label(token_map: VisualTokenMap, height: float) -> str:
    """What the colours stand for, in lines that are not longer than the bar."""
    layers = token_map.layers
    where = f"in layer {layers[0]}" if len(layers) == 1 else f"in {len(layers)} layers"
    label = f"KV heads that keep the token, of {token_map.pairs} {where}"
    return textwrap.fill(label, max(12, int(height / 0.065)))


def _draw_color_bar(figure: "Figure", layout: _Layout, left: float, colors: "ScalarMappable") -> None:
    """The colours of the counts, and below them a box for no head at all, which has none."""
    from matplotlib.ticker import MaxNLocator

    bottom = layout.panel_bottom
    blank = layout.axes(figure, left, bottom, _BAR, _BAR)
    blank.set(facecolor="white", xticks=[], yticks=[0.5], yticklabels=["0"])
    blank.yaxis.tick_right()
    blank.tick_params(labelsize=_BAR_SIZE)

    start = 1.4 * _BAR
    axes = layout.axes(figure, left, bottom + start, _BAR, layout.panel_height - start)
    bar = figure.colorbar(colors, cax=axes)
    bar.set_label(layout.bar_label, fontsize=_BAR_SIZE)
    bar.ax.tick_params(labelsize=_BAR_SIZE)
    bar.locator = MaxNLocator(nbins=6, integer=True)
    bar.update_ticks()
