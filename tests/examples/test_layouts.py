import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_vlm.document_questions import ASK, LAYOUTS_OF_TASK, TASKS, held_out_examples, held_out_of_task
from tiny_vlm.layouts import LAYOUTS, PAGE_SIZES, document_image, draw_document, random_document
from tiny_vlm.llava_batches import BATCH
from tiny_vlm.pages import BUILTIN_FONTS, char_edges, draw_ink

SEEDS = st.integers(0, 2**32)


def right_edge(line):
    return line.left + char_edges(line.text, line.font, line.size)[-1]


@given(seed=SEEDS, layout=st.sampled_from(LAYOUTS), size=st.sampled_from(sorted(BATCH)))
@settings(max_examples=60, deadline=None)
def test_all_of_a_document_lies_on_its_page(seed, layout, size):
    height, width = size
    document = random_document(random.Random(seed), height, width, [layout])
    assert document.fields or document.cells
    for line in document.lines:
        assert line.left >= 0
        assert right_edge(line) <= width
        assert line.baseline - 0.8 * line.size > 0
        assert line.baseline + 0.25 * line.size <= height
    for box in document.boxes:
        assert 0 <= box.left <= box.right < width
        assert 0 <= box.top <= box.bottom < height


@given(seed=SEEDS, layout=st.sampled_from(LAYOUTS))
@settings(max_examples=40, deadline=None)
def test_texts_of_one_row_do_not_overlap(seed, layout):
    document = random_document(random.Random(seed), 448, 448, [layout])
    for line in document.lines:
        for other in document.lines:
            if line is not other and abs(line.baseline - other.baseline) < 10:
                assert right_edge(line) <= other.left or right_edge(other) <= line.left


@given(seed=SEEDS, task=st.sampled_from(TASKS))
@settings(max_examples=60, deadline=None)
def test_an_answer_stands_on_the_page(seed, task):
    rng = random.Random(seed)
    document = random_document(rng, 448, 672, LAYOUTS_OF_TASK[task])
    if (asked := ASK[task](rng, document)) is None:
        return
    name, question, answer = asked
    assert name in (task, "lookup")
    shown = {line.text for line in document.lines} | {word for line in document.lines for word in line.text.split(": ")}
    if task == "cell":
        row, column = question.removeprefix("What is in row ").removesuffix("?").split(", column ")
        assert document.cell_texts[row, column] == answer
        assert {row, column, answer} <= shown
    elif task in ("lookup", "multi"):
        assert set(answer.split("; ")) <= shown
    else:
        assert all(line in document.read for line in answer.split("\n"))


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_table_has_each_cell_below_its_column_and_beside_its_row(seed):
    document = random_document(random.Random(seed), 672, 672, ["table"])
    table = document.lines[len(document.fields) :]
    place = {line.text: line for line in table}
    baselines = {line.text: line.baseline for line in table}
    for (row, column), text in document.cells:
        beside = [line for line in table if line.baseline == baselines[row] and line.text == text]
        below = [
            line
            for line in beside
            if line.left < right_edge(place[column]) + 100 and right_edge(line) > place[column].left - 100
        ]
        assert below


def test_boxes_are_drawn():
    document = random_document(random.Random(2), 448, 448, ["form"])
    box = document.boxes[0]
    assert draw_document(document)[box.top, (box.left + box.right) // 2] == box.cover
    assert draw_ink(document)[box.top, (box.left + box.right) // 2] == 0


@pytest.mark.parametrize("task", TASKS)
def test_examples_of_a_task_are_those_among_all_held_out_examples(task):
    everything = [one for one in held_out_examples(2 * len(TASKS)) if one.task == task]
    for one, other in zip(held_out_of_task(task, 2), everything, strict=True):
        assert one[2:] == other[2:]
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_held_out_tasks_and_page_sizes_take_turns():
    examples = list(held_out_examples(len(TASKS) * (len(PAGE_SIZES) + 1)))
    assert [one.task for one in examples] == list(TASKS) * (len(PAGE_SIZES) + 1)
    assert [one.image.size[::-1] for one in examples[:: len(TASKS)]] == [*PAGE_SIZES, PAGE_SIZES[0]]


def test_another_seed_gives_other_examples():
    pairs = zip(held_out_examples(5), held_out_examples(5, seed=1), strict=True)
    assert all(first.answer != second.answer for first, second in pairs)


def test_documents_can_do_with_the_builtin_font():
    documents = [random_document(random.Random(seed), 448, 448, fonts=BUILTIN_FONTS) for seed in range(8)]
    assert {line.font for document in documents for line in document.lines} == {"builtin"}


def test_noise_depends_on_the_seed_alone():
    document = random_document(random.Random(3), 224, 224)
    first, again, other = (np.asarray(document_image(document, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
