import math
import re

import pytest

import quickstart
from common import ASSETS, TINY_LLAVA, sample_documents
from mmshiftkv.report import format_bytes
from tiny_llava import FAMILIES, document_image, save_tiny_llava

DOCUMENTS = sample_documents()
BYTES_PER_TOKEN = 6 * 2 * 2 * 32 * 2  # of the embedded model: layers, keys and values, heads, head dimension, bfloat16


def run(capsys, *arguments):
    """The table that the script prints: one list of cells for each row, the header left out."""
    quickstart.main([*arguments, "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("cache "))
    rows = lines[start + 1 : lines.index("", start)]
    return [re.split(r" {2,}", row, maxsplit=4) for row in rows]


def bytes_of(text):
    number, unit = text.split()
    return float(number) * 1024 ** ["B", "KiB", "MiB", "GiB"].index(unit)


def test_the_sample_document_is_read_with_the_full_cache_and_four_budgets(capsys):
    full, *compressed = run(capsys)
    expected = next(iter(DOCUMENTS.values()))[0]["answer"]
    name, seen, kept, size, answer = full
    assert (name, kept, answer) == ("DynamicCache", seen, expected)
    # The embedded model writes one token a character; its last token, the end of the answer, is never stored.
    assert size == format_bytes((int(seen) + len(answer)) * BYTES_PER_TOKEN)
    budgets = (128, 64, 32, 16)
    assert [row[0] for row in compressed[::2]] == [f"ShiftKVCache, budget {budget}" for budget in budgets]
    assert [row[0] for row in compressed[1::2]] == [f"ShiftKVCache, budget {budget}, value-aware" for budget in budgets]
    assert {row[1] for row in compressed} == {seen}
    for rows in (compressed[::2], compressed[1::2]):
        assert [row[2] for row in rows] == ["128", "64", "32", "16"]
        sizes = [bytes_of(row[3]) for row in (full, *rows)]
        assert sizes == sorted(set(sizes), reverse=True)


def test_image_and_question_are_printed_above_the_table(capsys):
    quickstart.main(["--device", "cpu", "--budget", "16", "--max-new-tokens", "1"])
    name, questions = next(iter(DOCUMENTS.items()))
    assert capsys.readouterr().out.startswith(f"image: {name}\nquestion: {questions[0]['question']}\n\ncache ")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_budget_that_covers_the_prompt_gives_the_answer_of_the_full_cache(capsys, name):
    sample, image = DOCUMENTS[name][0], str(ASSETS / name)
    full, *rows = run(capsys, "--image", image, "--question", sample["question"], "--budget", "100000", "1.0")
    assert full[4] == sample["answer"]
    assert [row[1:3] for row in rows] == [full[1:3]] * 4
    assert [row[4] for row in rows] == [full[4]] * 4


def test_a_fraction_of_the_prompt_is_rounded_up(capsys):
    _, row = run(capsys, "--budget", "0.1", "--max-new-tokens", "2", "--preset", "value-aware")
    assert int(row[2]) == math.ceil(int(row[1]) / 10)


def test_a_run_can_be_repeated(capsys):
    assert run(capsys, "--budget", "24") == run(capsys, "--budget", "24")


def test_the_second_embedded_model_reads_its_own_sample_document(capsys):
    rows = run(capsys, "--model", "llava", "--budget", "512", "--preset", "value-aware")
    truth = next(iter(sample_documents(str(TINY_LLAVA)).values()))[0]["answer"]
    assert [row[4] for row in rows] == [truth, truth]
    assert int(rows[0][1]) > 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_llava_next_runs_too(capsys, tmp_path, family):
    save_tiny_llava(tmp_path, family)
    document_image(300, 100).save(tmp_path / "page.png")
    arguments = ["--model", str(tmp_path), "--image", str(tmp_path / "page.png"), "--question", "What is due?"]
    full, covered, small = run(
        capsys, *arguments, "--budget", "4096", "20", "--max-new-tokens", "12", "--preset", "published"
    )
    assert full[4]
    assert covered[1:3] == full[1:3]
    assert covered[4] == full[4]
    assert small[1:3] == [full[1], "20"]
    assert bytes_of(small[3]) < bytes_of(full[3])


def test_line_breaks_in_an_answer_keep_the_table_in_rows():
    table = quickstart.format_table([quickstart.Row("DynamicCache", 7, 7, 2048, "one\ntwo")])
    assert table.splitlines()[1].endswith("2.0 KiB  one / two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png", "--question", "Why?"], "argument --image: no such file: 'missing.png'"),
        (["--image", str(ASSETS / "document_2.png")], "--image needs a --question"),
        (["--image", __file__, "--question", "Why?"], f"argument --image: not an image that can be read: {__file__!r}"),
        (["--device", "abacus"], "argument --device: cannot use 'abacus'"),
        (["--budget", "0"], "at least 1, or a fraction of the prompt in (0, 1], got '0'"),
        (["--budget", "64", "-1"], "got '-1'"),
        (["--budget", "1.5"], "got '1.5'"),
        (["--budget", "nan"], "got 'nan'"),
        (["--budget", "many"], "got 'many'"),
        (["--max-new-tokens", "0"], "argument --max-new-tokens: needs a whole number, at least 1, got '0'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
