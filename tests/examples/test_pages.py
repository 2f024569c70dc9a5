import hashlib
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common import TINY_MODEL
from tiny_vlm import documents
from tiny_vlm.pages import (
    ALL_FONTS,
    ASK,
    BUILTIN_FONTS,
    KEYS,
    MARGIN,
    PAGE_SIZES,
    TASKS,
    char_edges,
    draw_ink,
    field_question,
    held_out_examples,
    held_out_of_task,
    page_image,
    random_page,
)

ASSETS = TINY_MODEL.parent
SEEDS = st.integers(0, 2**32)

# The embedded model was measured on these pages: numbers can be compared only while they stay as they are.
HELD_OUT = [
    ("lookup", (336, 336), "What is the Batch?", "6A26F"),
    ("multi", (336, 336), "What are the Color and the Code?", "drfmv; Z8J2Y"),
    ("line", (336, 336), "Read line 6.", "cotocih"),
    (
        "all",
        (336, 336),
        "Read all the text.",
        "Account: 805789\nnomin tolufe muylxf qeu\nName: xcgycv\nRef: G4J-6E3\nInvoice: 5588\nItem: wsjnxwz",
    ),
    ("lookup", (504, 392), "What is the Color?", "bogi"),
    ("multi", (504, 392), "What are the Date, the Account and the Room?", "2025-09-12; 6320; 845076"),
]
PIXELS = [
    "cd291082cfb65bfc21a30d217855df08927281f1882337a40a55dc5495216466",
    "d4933b784dbdd1e3827b1b58634510af9267a0511253a2cc0ec10d10dac63aa0",
    "9e9eaead67639bb1031183e33bd6ce9ae3f20f84b8d6c286b9c966c3710473a8",
    "ce64da0f5f20388b01b3fe074e1b6747bd4ff767915c2db16d2a024aaaf7074a",
    "5c9dfd559c437d4b5c8c36b8b941f559a460beef5bb730fb87a017adb2a6468b",
    "483d177f7feb703fbcb8b1f45edb206f1ee86edd54efcab1d473bdba2f5451d0",
]


def same(first, second):
    return (
        first.task == second.task
        and first.question == second.question
        and first.answer == second.answer
        and np.array_equal(np.asarray(first.image), np.asarray(second.image))
    )


def test_held_out_examples_are_those_that_the_model_was_measured_on():
    examples = list(held_out_examples(len(HELD_OUT)))
    assert [(one.task, one.image.size, one.question, one.answer) for one in examples] == HELD_OUT
    assert [hashlib.sha256(one.image.tobytes()).hexdigest() for one in examples] == PIXELS


def test_held_out_tasks_and_page_sizes_take_turns():
    examples = list(held_out_examples(len(TASKS) * (len(PAGE_SIZES) + 1)))
    assert [one.task for one in examples] == list(TASKS) * (len(PAGE_SIZES) + 1)
    assert [one.image.size[::-1] for one in examples[:: len(TASKS)]] == [*PAGE_SIZES, PAGE_SIZES[0]]


def test_examples_of_a_task_are_those_among_all_held_out_examples():
    everything = list(held_out_examples(12))
    for task in TASKS:
        wanted = [one for one in everything if one.task == task]
        assert all(same(*pair) for pair in zip(held_out_of_task(task, 3), wanted, strict=True))


def test_another_seed_gives_other_examples():
    assert not any(same(*pair) for pair in zip(held_out_examples(4), held_out_examples(4, seed=1), strict=True))


@given(seed=SEEDS, size=st.sampled_from(PAGE_SIZES))
@settings(max_examples=40, deadline=None)
def test_a_page_shows_its_fields_within_its_margins(seed, size):
    height, width = size
    page = random_page(random.Random(seed), height, width)
    texts = [line.text for line in page.lines]
    assert page.fields
    assert [f"{key}: {value}" for key, value in page.fields.items()] == [
        text for text in texts if text.split(":")[0] in KEYS and ":" in text
    ]
    baselines = [line.baseline for line in page.lines]
    assert baselines == sorted(set(baselines))
    for line in page.lines:
        assert line.left >= MARGIN
        assert line.left + char_edges(line.text, line.font, line.size)[-1] <= width - MARGIN
        assert MARGIN < line.baseline <= height - MARGIN
        assert 15 <= line.size <= 28


@given(seed=SEEDS, task=st.sampled_from(TASKS))
@settings(max_examples=40, deadline=None)
def test_an_answer_says_what_the_page_shows(seed, task):
    rng = random.Random(seed)
    page = random_page(rng, 448, 560)
    asked, question, answer = ASK[task](rng, page)
    assert asked == task or (task, asked, len(page.fields)) == ("multi", "lookup", 1)
    if asked in ("lookup", "multi"):
        keys = [word.strip(",?") for word in question.split() if word.strip(",?") in KEYS]
        assert answer == "; ".join(page.fields[key] for key in keys)
    elif asked == "line":
        number = int(question.removeprefix("Read line ").removesuffix("."))
        assert answer == page.lines[number - 1].text
    else:
        assert answer.split("\n") == [line.text for line in page.lines]


def test_questions_about_several_fields_name_them_in_order():
    page = documents.sample_page("document_1.png")
    assert field_question(page, ["Name"]) == ("lookup", "What is the Name?", "hiluto")
    assert field_question(page, ["Due", "Name", "Order"]) == (
        "multi",
        "What are the Due, the Name and the Order?",
        "2037-12-19; hiluto; 054002",
    )


@pytest.mark.parametrize("font", ALL_FONTS)
def test_ink_lies_where_the_line_is(font):
    page = random_page(random.Random(0), 336, 336, max_lines=1, fonts=[font])
    (line,) = page.lines
    assert line.font == font
    rows, columns = np.nonzero(draw_ink(page) > 127)
    assert line.baseline - line.size <= rows.min()
    assert rows.max() <= line.baseline + 0.4 * line.size
    right = line.left + char_edges(line.text, line.font, line.size)[-1]
    assert line.left - 1 <= columns.min() < line.left + line.size
    assert right - line.size < columns.max() <= right + 1


def test_noise_depends_on_the_seed_alone():
    page = replace(random_page(random.Random(3), 336, 336), noise=8.0)
    first, again, other = (np.asarray(page_image(page, seed)).astype(float) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    # Colors near white are cut off at 255, so that the noise left is a little less than 8 * sqrt(2).
    assert 6 < (first - other).std() < 12


def test_builtin_font_needs_no_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from tiny_vlm import pages\n"
        "print(len(list(pages.held_out_examples(2, fonts=pages.BUILTIN_FONTS))))\n"
        "list(pages.held_out_examples(8))\n"
    )
    folder = TINY_MODEL.parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert run.stdout == "2\n"
    assert run.returncode != 0
    assert 'comes with matplotlib: pip install "mmshiftkv[plot]"' in run.stderr


def test_builtin_font_only_pages_use_no_other_font():
    pages = [random_page(random.Random(seed), 336, 336, fonts=BUILTIN_FONTS) for seed in range(5)]
    assert {line.font for page in pages for line in page.lines} == {"builtin"}


@pytest.mark.parametrize("name", documents.SAMPLES)
def test_sample_documents_are_the_generator_s_pages(name):
    with Image.open(ASSETS / name) as stored:
        assert np.array_equal(np.asarray(stored), np.asarray(page_image(documents.sample_page(name), seed=0)))


def test_sample_documents_are_those_that_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["documents", str(tmp_path)])
    documents.main()
    assert len(list(tmp_path.iterdir())) == 7
    for path in tmp_path.iterdir():
        if path.suffix == ".json":
            assert path.read_text() == (ASSETS / path.name).read_text()
            continue
        with Image.open(path) as written, Image.open(ASSETS / path.name) as stored:
            assert np.array_equal(np.asarray(written), np.asarray(stored))
