"""Has every setup of compare.py answer the same questions."""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.quality.comparison import Recall, Result, Setup
from benchmarks.quality.peers import Prompts
from benchmarks.quality.questions import example_batches, question_batches
from benchmarks.quality.recall import decode_attention, recall
from benchmarks.quality.scoring import estimate, summarize
from mmshiftkv import Document
from tiny_vlm.answering import MAX_NEW_TOKENS, answer_tokens
from tiny_vlm.pages import Example


class Measurement:
    """What the setups answered to the questions of one task, and what their caches had kept."""

    def __init__(self, model: Any, processor: Any, task: str) -> None:
        self._model, self._processor, self._task = model, processor, task
        self._attention: list[torch.Tensor] = []
        self.answers: dict[Setup, list[tuple[str, str]]] = defaultdict(list)
        self.recalls: dict[Setup, list[torch.Tensor]] = defaultdict(list)

    def answer(self, setup: Setup, inputs: Any, truths: Sequence[str]) -> None:
        """Has one setup answer a batch; the full cache must come first, as the others are held against it, and the
        limit is made of what it attended to."""
        cache: Any = setup.make_cache(self._model, Prompts(inputs, self._processor.tokenizer, self._attention))
        tokens = answer_tokens(self._model, inputs, cache, MAX_NEW_TOKENS[self._task])
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        self.answers[setup].extend(zip(texts, truths, strict=True))
        if setup.method == "full":
            self._attention = decode_attention(self._model, inputs, tokens, cache)
        self.recalls[setup].append(recall(self._attention, cache).cpu())

    def recall(self, setup: Setup) -> Recall | None:
        """The recall of all batches; None if no answer had a decoding step."""
        by_layer = torch.cat(self.recalls[setup])
        by_layer = by_layer[by_layer.isfinite().all(dim=1)]
        if not len(by_layer):
            return None
        return Recall(estimate(by_layer.mean(dim=1).tolist()), by_layer.mean(dim=0).tolist())


class DocumentMeasurement:
    """What the setups answered when they had read the pages of one task before its questions came; it has no recall."""

    def __init__(self, model: Any, processor: Any, task: str) -> None:
        self._model, self._processor, self._task = model, processor, task
        self.answers: dict[Setup, list[tuple[str, str]]] = defaultdict(list)

    def answer(self, setup: Setup, examples: Sequence[Example], truths: Sequence[str]) -> None:
        """Has one setup read each page by itself, and then answer the questions of all in one batch."""
        options = {**setup.document_options(), "max_new_tokens": MAX_NEW_TOKENS[self._task], "do_sample": False}
        documents = [
            Document(self._model, self._processor, example.image, decode_ahead=False, **options) for example in examples
        ]
        texts = Document.ask_each(documents, [example.question for example in examples])
        self.answers[setup].extend(zip(texts, truths, strict=True))

    def recall(self, setup: Setup) -> Recall | None:
        """None."""
        return None


def measure(model: Any, processor: Any, setups: Sequence[Setup], arguments: argparse.Namespace) -> list[Result]:
    """Answers the same questions with every setup; a batch holds one task, as answers differ in length by task."""
    kind: Any = DocumentMeasurement if arguments.document_first else Measurement
    tasks = {task: kind(model, processor, task) for task in arguments.tasks}
    total = len(tasks) * arguments.count * len(setups)
    with tqdm(total=total, unit="answer") as progress:
        for task, measurement in tasks.items():
            for inputs, truths in _batches(model, processor, task, arguments):
                for setup in setups:
                    progress.set_description(f"{task}, {setup.method} {setup.budget or ''}".rstrip())
                    measurement.answer(setup, inputs, truths)
                    progress.update(len(truths))
    results = []
    for setup in setups:
        recalls = {task: measurement.recall(setup) for task, measurement in tasks.items()}
        results.append(
            Result(
                setup,
                {task: summarize(measurement.answers[setup]) for task, measurement in tasks.items()},
                {task: found for task, found in recalls.items() if found is not None},
            )
        )
    return results


def _batches(
    model: Any, processor: Any, task: str, arguments: argparse.Namespace
) -> Iterator[tuple[Any, Sequence[str]]]:
    """What `answer` takes of each batch, and the right answers."""
    if not arguments.document_first:
        yield from question_batches(model, processor, task, arguments)
        return
    for examples in example_batches(model, task, arguments):
        yield examples, [example.answer for example in examples]
