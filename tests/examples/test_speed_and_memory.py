import json

import pytest

import speed_and_memory
from random_models import random_model


def test_the_selection_is_measured_step_by_step(tmp_path, capsys):
    speed_and_memory.main(["--selection", "--tiny", "--repeats", "2", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert [(row["batch"], row["tokens"]) for row in record["selection"]] == [(1, 33), (1, 64)]
    assert [(row["cache"], row["tokens"]) for row in record["prefill"]] == [
        ("DynamicCache", 33),
        ("ShiftKVCache 8", 33),
        ("DynamicCache", 64),
        ("ShiftKVCache 8", 64),
    ]
    assert all(row["seconds"] > 0 for row in record["prefill"])
    assert record["environment"]["torch"]
    assert "milliseconds per layer" in printed
    assert "ShiftKVCache 8" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --selection"),
        (["--selection", "--lengths", "0"], "at least 1"),
        (["--selection", "--json", "no/x"], "no"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        speed_and_memory.main(arguments)
    assert words in capsys.readouterr().err


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"name='gpt' must be one of qwen2.5-vl-7b, llava-1.6-vicuna-7b, tiny"):
        random_model("gpt", None, None)
