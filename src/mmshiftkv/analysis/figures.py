"""Figures of matplotlib, which is only imported when one is drawn."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """An empty figure of this size in inches; it needs no display and belongs to no global state of matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('a figure needs matplotlib: pip install "mmshiftkv[plot]"') from error
    return Figure(figsize=(width, height), layout=layout)
