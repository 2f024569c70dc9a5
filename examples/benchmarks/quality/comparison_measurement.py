"""Has every setup of compare.py answer the same questions, in one process or in several."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.processes import Processes
from benchmarks.quality.comparison import Recall, Result, Setup
from benchmarks.quality.peers import Prompts
from benchmarks.quality.questions import example_batches, inputs_of
from benchmarks.quality.recall import decode_attention, recall
from benchmarks.quality.scoring import estimate, summarize
from mmshiftkv import Document
from tiny_vlm.answering import MAX_NEW_TOKENS, answer_tokens
from tiny_vlm.pages import Example


@dataclass(frozen=True)
class Answers:
    """What one setup answered to a batch of one task's questions.

    Attributes:
        task: the task.
        setup: the setup.
        pairs: of each question the answer and the right one.
        recall: (B, layers) float32 on the CPU, of what the setup's cache had kept; None where it is not measured.
    """

    task: str
    setup: Setup
    pairs: list[tuple[str, str]]
    recall: torch.Tensor | None = None


class Batch:
    """A batch of one task's questions, which one setup after the other answers."""

    def __init__(self, model: Any, processor: Any, task: str, examples: Sequence[Example]) -> None:
        self._model, self._processor, self._task = model, processor, task
        self._truths = [example.answer for example in examples]
        self._inputs = inputs_of(model, processor, examples)
        self._attention: list[torch.Tensor] = []

    def answer(self, setup: Setup) -> Answers:
        """Has a setup answer; the full cache must come first, as the others are held against it, and the limit is made
        of what it attended to."""
        cache: Any = setup.make_cache(self._model, Prompts(self._inputs, self._processor.tokenizer, self._attention))
        tokens = answer_tokens(self._model, self._inputs, cache, MAX_NEW_TOKENS[self._task])
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        if setup.method == "full":
            self._attention = decode_attention(self._model, self._inputs, tokens, cache)
        pairs = list(zip(texts, self._truths, strict=True))
        return Answers(self._task, setup, pairs, recall(self._attention, cache).cpu())


class DocumentBatch:
    """A batch of one task's questions that come when a setup has read the pages; it has no recall."""

    def __init__(self, model: Any, processor: Any, task: str, examples: Sequence[Example]) -> None:
        self._model, self._processor, self._task, self._examples = model, processor, task, examples

    def answer(self, setup: Setup) -> Answers:
        """Has a setup read each page by itself, and then answer the questions of all in one batch."""
        options = {**setup.document_options(), "max_new_tokens": MAX_NEW_TOKENS[self._task], "do_sample": False}
        documents = [
            Document(self._model, self._processor, example.image, decode_ahead=False, **options)
            for example in self._examples
        ]
        texts = Document.ask_each(documents, [example.question for example in self._examples])
        truths = [example.answer for example in self._examples]
        return Answers(self._task, setup, list(zip(texts, truths, strict=True)))


def measure(
    model: Any, processor: Any, setups: Sequence[Setup], arguments: argparse.Namespace, processes: Processes
) -> list[Result]:
    """Answers the same questions with every setup, and returns in each process the results of all of them.

    A batch holds one task, as answers differ in length by task.  Processes take whole batches in turn, so that a batch
    is padded, and answered, as in one process.
    """
    kind: Any = DocumentBatch if arguments.document_first else Batch
    total = _own_questions(arguments, processes) * len(setups)
    answered: list[tuple[int, Answers]] = []
    with tqdm(total=total, unit="answer", disable=not processes.is_main) as progress:
        for number, (task, examples) in enumerate(_batches(model, arguments)):
            if processes.does(number):
                batch = kind(model, processor, task, examples)
                for setup in setups:
                    progress.set_description(f"{task}, {setup.method} {setup.budget or ''}".rstrip())
                    answered.append((number, batch.answer(setup)))
                    progress.update(len(examples))
    return _results(setups, arguments.tasks, processes.gather(answered))


def _batches(model: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, list[Example]]]:
    """All batches, in order: the task and its questions."""
    for task in arguments.tasks:
        for examples in example_batches(model, task, arguments):
            yield task, examples


def _own_questions(arguments: argparse.Namespace, processes: Processes) -> int:
    """How many questions this process answers."""
    starts = range(0, arguments.count, arguments.batch_size)
    sizes = [min(arguments.batch_size, arguments.count - start) for start in starts] * len(arguments.tasks)
    return sum(size for number, size in enumerate(sizes) if processes.does(number))


def _results(setups: Sequence[Setup], tasks: Sequence[str], answered: Sequence[Answers]) -> list[Result]:
    """The scores of all answers, which come in the order of the questions."""
    results = []
    for setup in setups:
        by_task = {task: [one for one in answered if (one.setup, one.task) == (setup, task)] for task in tasks}
        recalls = {task: _recall(found) for task, found in by_task.items()}
        results.append(
            Result(
                setup,
                {task: summarize([pair for one in found for pair in one.pairs]) for task, found in by_task.items()},
                {task: found for task, found in recalls.items() if found is not None},
            )
        )
    return results


def _recall(answered: Sequence[Answers]) -> Recall | None:
    """The recall of all batches; None if it was not measured, or no answer had a decoding step."""
    measured = [one.recall for one in answered if one.recall is not None]
    if not measured:
        return None
    by_layer = torch.cat(measured)
    by_layer = by_layer[by_layer.isfinite().all(dim=1)]
    if not len(by_layer):
        return None
    return Recall(estimate(by_layer.mean(dim=1).tolist()), by_layer.mean(dim=0).tolist())
