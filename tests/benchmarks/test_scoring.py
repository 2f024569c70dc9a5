import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.scoring import anls, bootstrap_interval, exact_match, summarize

TEXTS = st.text(alphabet="abAB1 .\n", max_size=12)


@pytest.mark.parametrize(
    ("prediction", "truth", "match"),
    [("A-1", "A-1", True), ("a-1", "A-1", False), ("A-1 ", "A-1", False), ("a\nb", "a b", False), ("", "", True)],
)
def test_exact_match_counts_case_and_white_space(prediction, truth, match):
    assert exact_match(prediction, truth) is match


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("58152117", "58152117", 1.0),
        ("HILUTO", "hiluto", 1.0),  # case does not count
        (" a\n b ", "a b", 1.0),  # nor does the kind of white space
        ("", "", 1.0),
        ("", "a", 0.0),
        ("58152118", "58152117", 7 / 8),
        ("5815211", "58152117", 7 / 8),  # divided by the longer text
        ("abxy", "abcd", 0.5),  # exactly at the threshold
        ("axyz", "abcd", 0.0),  # 0.25, below it
        ("kitten", "sitting", 4 / 7),
        ("flaw", "lawn", 0.5),  # one insertion and one deletion
        ("ab", "ba", 0.0),  # two replacements: letters that change places are not one mistake
    ],
)
def test_anls(prediction, truth, score):
    assert anls(prediction, truth) == pytest.approx(score)


@given(TEXTS, TEXTS)
def test_anls_is_symmetric_and_never_between_zero_and_the_threshold(prediction, truth):
    score = anls(prediction, truth)
    assert score == anls(truth, prediction)
    assert score == 0 or 0.5 <= score <= 1
    assert (score == 1) == (prediction.lower().split() == truth.lower().split())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 100))
def test_bootstrap_interval_repeats_and_stays_among_the_values(values, seed):
    low, high = bootstrap_interval(values, resamples=50, seed=seed)
    assert (low, high) == bootstrap_interval(values, resamples=50, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    values = [1.0] * 60 + [0.0] * 40
    low, high = bootstrap_interval(values)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 100)
    assert low == pytest.approx(0.6 - half, abs=0.015)
    assert high == pytest.approx(0.6 + half, abs=0.015)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_interval_of_equal_values_has_no_width():
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


def test_bootstrap_interval_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match=r"confidence must lie between 0 and 1, got 95"):
        bootstrap_interval([1.0], confidence=95)


def test_summary():
    summary = summarize([("abcd", "abcd"), ("ABCD", "abcd"), ("abcx", "abcd"), ("zzzz", "abcd")])
    assert summary.count == 4
    assert summary.exact_match.mean == 0.25
    assert summary.anls.mean == pytest.approx((1 + 1 + 0.75 + 0) / 4)
    assert summary.anls.low < summary.anls.mean < summary.anls.high
    with pytest.raises(ValueError, match="empty"):
        summarize([])
