"""Has every variation answer the same questions."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.quality.questions import question_batches
from benchmarks.quality.scoring import anls, estimate, exact_match
from benchmarks.quality.variation import Variation
from tiny_vlm.answering import MAX_NEW_TOKENS, answer

Scores = dict[tuple[str, int], dict[str, list[tuple[float, float]]]]  # exact match and ANLS of each answer, by task


def measure(model: Any, processor: Any, variations: Sequence[Variation], arguments: argparse.Namespace) -> Scores:
    """Has every variation answer the same questions at every budget, with a progress bar."""
    setups = [(variation, budget) for variation in variations for budget in arguments.budgets]
    scores: Scores = {(variation.name, budget): {task: [] for task in arguments.tasks} for variation, budget in setups}
    with tqdm(total=len(arguments.tasks) * arguments.count * len(setups), unit="answer") as progress:
        for task in arguments.tasks:
            for inputs, truths in question_batches(model, processor, task, arguments):
                for variation, budget in setups:
                    progress.set_description(f"{task}, {variation.name}, {budget}")
                    cache = variation.make_cache(model, budget)
                    texts = answer(model, processor, inputs, cache, MAX_NEW_TOKENS[task])
                    scores[variation.name, budget][task].extend(
                        (float(exact_match(text, truth)), anls(text, truth))
                        for text, truth in zip(texts, truths, strict=True)
                    )
                    progress.update(len(truths))
    return scores


def by_question(scores: Scores, name: str, budget: int) -> np.ndarray:
    """Exact match of the n-th question of each task, averaged over the tasks: (count,) fractions.

    The n-th questions of all tasks are about pages of one size, so they are drawn together in a bootstrap.
    """
    tasks = scores[name, budget].values()
    return np.mean([[exact for exact, _ in answers] for answers in tasks], axis=0)


def summarized(scores: Scores, variations: Sequence[Variation], budget: int) -> list[dict[str, Any]]:
    """The figures of each variation at one budget, best mean exact match first; differences are to the first one."""
    baseline = by_question(scores, variations[0].name, budget)
    results = []
    for variation in variations:
        exact = by_question(scores, variation.name, budget)
        by_task = scores[variation.name, budget]
        results.append(
            {
                "variation": variation.name,
                "budget": budget,
                "settings": variation.changes,
                "exact_match": asdict(estimate(exact.tolist())),
                "difference": asdict(estimate((exact - baseline).tolist())),
                "tasks": {
                    task: dict(zip(("exact_match", "anls"), np.mean(answers, axis=0).tolist(), strict=True))
                    for task, answers in by_task.items()
                },
            }
        )
    return sorted(results, key=lambda result: -result["exact_match"]["mean"])
