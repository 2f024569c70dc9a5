import argparse
import json
import platform

import pytest
import torch
import transformers

from benchmarks import report


def test_cells_end_at_the_same_place_except_in_columns_on_the_left():
    lines = report.table(["name", "n"], [["a", "1"], ["long name", "10.50"]], left=["name"]).splitlines()
    assert lines == ["name           n", "a              1", "long name  10.50"]


def test_blocks_have_an_empty_line_between_them():
    lines = report.table(["n"], [["1"], ["2"]], [["3"]]).splitlines()
    assert [line.strip() for line in lines] == ["n", "1", "2", "", "3"]


def test_numbers_stay_as_they_are_written():
    assert "1.50" in report.table(["n"], [["1.50"], ["2"], ["-"]])


def test_markdown():
    header, rule, first, second = report.table(
        ["a", "b"], [["x", "1"]], [["y", "-"]], left=["a"], markdown=True
    ).splitlines()
    assert [header.split(), first.split(), second.split()] == [
        ["|", "a", "|", "b", "|"],
        ["|", "x", "|", "1", "|"],
        ["|", "y", "|", "-", "|"],
    ]
    assert set(rule) <= set("|-:")


def test_the_environment():
    found = report.environment(torch.device("cpu"))
    assert list(found) == ["device", "torch", "transformers", "triton", "python"]
    assert found["device"].startswith("cpu (")
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["python"] == platform.python_version()


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = {"settings": {"seed": 1}, "rows": [0.1, None, "ä"]}
    report.write_record(tmp_path / "out.json", record)
    assert report.read_record(str(tmp_path / "out.json"), "script.py", lambda found: found["rows"]) == record


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"rows": 1}'])
def test_what_is_no_record_is_named(text, tmp_path):
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"out.json' is no JSON file of script.py: "):
        report.read_record(str(tmp_path / "out.json"), "script.py", lambda found: list(found["rows"]))


def test_a_record_is_plain_json(tmp_path):
    report.write_record(tmp_path / "out.json", {"a": 1})
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": 1}
    assert text.endswith("}\n")
