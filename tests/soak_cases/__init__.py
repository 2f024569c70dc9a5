"""Randomised cases of the soak, by category."""

from .case import Case
from .generating import CoveringBudget, SmallBudget

CATEGORIES: dict[str, type[Case]] = {
    "generate": SmallBudget,
    "covering": CoveringBudget,
}
