"""How well an answer matches the truth: exact match, ANLS, and how sure their means are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5


@dataclass(frozen=True)
class Estimate:
    """A mean of scores 0..1 and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The scores of `count` answers."""

    count: int
    exact_match: Estimate
    anls: Estimate


def exact_match(prediction: str, truth: str) -> bool:
    """Whether both are the same, character by character: case, spaces and line breaks count."""
    return prediction == truth


def anls(prediction: str, truth: str) -> float:
    """Average normalized Levenshtein similarity of one answer, as DocVQA scores it (one accepted answer).

    1 - distance / length of the longer text, and 0 where that is below 0.5. Case does not count, nor does the amount
    of white space: both texts are lowercased, stripped, and their runs of white space (line breaks too) become one
    space, as in the official evaluation script of the Robust Reading Competition. At exactly 0.5 that script gives 0.5
    and this function too; the formula in Biten et al., "Scene Text Visual Question Answering" (ICCV 2019,
    https://arxiv.org/abs/1905.13648), which introduced the measure, gives 0 there.
    """
    predicted, true = (" ".join(text.lower().split()) for text in (prediction, truth))
    return Levenshtein.normalized_similarity(predicted, true, score_cutoff=ANLS_THRESHOLD)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; the same values and seed give the same interval.

    It has no width when all values are equal, however few they are. Raises ValueError for no values and for a
    confidence outside (0, 1).
    """
    if not len(values):
        raise ValueError("values is empty: the mean of nothing has no interval")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    scores = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(len(scores), size=(resamples, len(scores)))
    low, high = np.quantile(scores[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of scores; raises ValueError when there are none."""
    low, high = bootstrap_interval(values)
    return Estimate(float(np.mean(values)), low, high)


def summarize(pairs: Sequence[tuple[str, str]]) -> Summary:
    """The scores of (prediction, truth) pairs; raises ValueError when there are none."""
    return Summary(
        count=len(pairs),
        exact_match=estimate([float(exact_match(prediction, truth)) for prediction, truth in pairs]),
        anls=estimate([anls(prediction, truth) for prediction, truth in pairs]),
    )
