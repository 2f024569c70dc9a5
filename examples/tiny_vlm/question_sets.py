"""Which questions and pages a model was trained on, by its type."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tiny_vlm import document_questions, pages
from tiny_vlm.pages import Example


class QuestionSet(NamedTuple):
    """Held-out questions about one kind of page.

    Attributes:
        tasks: kinds of questions.
        held_out_examples: of count, seed and fonts, the first examples, whose tasks take turns.
        held_out_of_task: of task, count, seed and fonts, the first examples of the task among them.
    """

    tasks: tuple[str, ...]
    held_out_examples: Callable[..., Iterator[Example]]
    held_out_of_task: Callable[..., Iterator[Example]]


PAGES = QuestionSet(pages.TASKS, pages.held_out_examples, pages.held_out_of_task)
DOCUMENTS = QuestionSet(
    document_questions.TASKS, document_questions.held_out_examples, document_questions.held_out_of_task
)
BY_MODEL_TYPE = {"llava_next": DOCUMENTS}
ALL_TASKS = tuple(dict.fromkeys((*PAGES.tasks, *DOCUMENTS.tasks)))


def questions_of(model_type: str) -> QuestionSet:
    """The documents in four layouts for a LLaVA-NeXT, the first model's pages for every other model."""
    return BY_MODEL_TYPE.get(model_type, PAGES)


def questions_for(model: Any) -> QuestionSet:
    """The questions for a loaded model, by its type."""
    return questions_of(model.config.model_type)


def check_tasks(model: Any, tasks: list[str]) -> None:
    """Raises ValueError for a task that cannot be asked about the model's pages."""
    allowed = questions_for(model).tasks
    for task in tasks:
        if task not in allowed:
            raise ValueError(
                f"--tasks: {task!r} is not asked about the pages of a {model.config.model_type} model; "
                f"allowed are {', '.join(allowed)}"
            )
