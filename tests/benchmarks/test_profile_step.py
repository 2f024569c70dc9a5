import json

import pytest

from benchmarks.speed import profile_step

OPTIONS = ["--random-weights", "tiny", "--length", "40", "--new-tokens", "6", "--dtype", "float32", "--device", "cpu"]


def test_both_ways_are_timed(tmp_path, capsys):
    path = tmp_path / "step.json"
    profile_step.main([*OPTIONS, "--batches", "1", "2", "--budgets", "8", "--repeats", "1", "--json", str(path)])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [(step["batch"], step["budget"], [*step["milliseconds"]]) for step in record["steps"]] == [
        (1, 8, ["whole", "blocks"]),
        (2, 8, ["whole", "blocks"]),
    ]
    assert all(spent > 0 for step in record["steps"] for spent in step["milliseconds"].values())
    assert record["milliseconds_to_read"] > 0
    assert "batch 2, budget 8: whole" in capsys.readouterr().out


def test_a_step_reads_all_weights_of_the_text_model_but_the_table():
    model = profile_step.load(profile_step.parse_arguments(OPTIONS))
    decoder = sum(part.nbytes for part in model.get_decoder().parameters())
    table = model.get_input_embeddings().weight.nbytes
    assert profile_step.weight_bytes(model) == decoder - table + model.lm_head.weight.nbytes


def test_a_cold_start_is_one_of_a_process_of_its_own():
    arguments = profile_step.parse_arguments([*OPTIONS, "--budgets", "8"])
    assert isinstance(profile_step.cold_start("blocks", arguments), float)


def test_bad_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        profile_step.main(["--new-tokens", "4"])
    assert "the first 4 of a run are not timed" in capsys.readouterr().err
