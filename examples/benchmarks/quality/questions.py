"""The questions about generated documents that the caches answer, in batches; their share of the command line."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from common import DTYPES, TINY_MODEL, choose_device, existing_folder, needs_package, output_file, positive_integer
from tiny_vlm.pages import ALL_FONTS, BUILTIN_FONTS, HELD_OUT_SEED, Example
from tiny_vlm.question_sets import ALL_TASKS, questions_for

DEVELOPMENT_SEED = HELD_OUT_SEED + 2  # calibrate.py has the one between


def question_arguments(budgets: Sequence[int] | None, tasks: Sequence[str], seed: int) -> argparse.ArgumentParser:
    """The arguments on model, questions and, unless None, budgets, with these defaults; a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add(
        "--model",
        type=existing_folder,
        default=TINY_MODEL,
        help="folder of the model and its processor; a LLaVA-NeXT is asked about the second model's documents, every"
        " other model about the first one's pages (default: the small Qwen2.5-VL of this repository)",
    )
    if budgets is not None:
        add(
            "--budgets",
            nargs="+",
            type=positive_integer,
            default=list(budgets),
            help="tokens per layer and KV head (default: %(default)s)",
        )
    add("--tasks", nargs="+", choices=ALL_TASKS, default=list(tasks), help="kinds of questions (default: %(default)s)")
    add("--count", type=positive_integer, default=100, help="questions of each task (default: %(default)s)")
    add("--batch-size", type=positive_integer, default=8, help="questions answered together (default: %(default)s)")
    add("--seed", type=int, default=seed, help="of the pages and questions (default: %(default)s)")
    add("--builtin-font-only", action="store_true", help="draw the pages without the fonts that come with matplotlib")
    add("--device", type=choose_device, help="where to run (default: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="float32", help="auto: that of the checkpoint (default: %(default)s)")
    add("--json", type=output_file, help="write settings, versions and scores to this file")
    return parser


def check_fonts(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exits with a message where the pages need fonts that are not there."""
    try:
        if not arguments.builtin_font_only:
            needs_package("matplotlib", "plot")
    except argparse.ArgumentTypeError as error:
        parser.error(f"drawing the pages without --builtin-font-only {error}")


def batches(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    """Lists of `size` examples; the last one may be shorter."""
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def example_batches(model: Any, task: str, arguments: argparse.Namespace) -> Iterator[list[Example]]:
    """Pages, questions and answers of a task of the model's, in batches."""
    fonts = BUILTIN_FONTS if arguments.builtin_font_only else ALL_FONTS
    held_out_of_task = questions_for(model).held_out_of_task
    return batches(held_out_of_task(task, arguments.count, arguments.seed, fonts), arguments.batch_size)


def inputs_of(model: Any, processor: Any, batch: Sequence[Example]) -> Any:
    """The inputs of a batch of questions, on the model's device."""
    from tiny_vlm.answering import build_inputs

    images, questions = [example.image for example in batch], [example.question for example in batch]
    return build_inputs(processor, images, questions).to(model.device, model.dtype)


def question_batches(
    model: Any, processor: Any, task: str, arguments: argparse.Namespace
) -> Iterator[tuple[Any, list[str]]]:
    """Of each batch of a task's questions the inputs, on the model's device, and the right answers."""
    for batch in example_batches(model, task, arguments):
        yield inputs_of(model, processor, batch), [example.answer for example in batch]
