import json

import pytest

from benchmarks.speed import joined


def test_each_batch_has_a_row_for_each_cache(tmp_path, capsys):
    path = tmp_path / "joined.json"
    options = [
        "--random-weights",
        "tiny",
        "--batches",
        "1",
        "3",
        "--length",
        "40",
        "--budget",
        "8",
        "--new-tokens",
        "6",
    ]
    joined.main([*options, "--repeats", "1", "--device", "cpu", "--json", str(path)])
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = [(row["batch"], row["cache"], row["error"]) for row in record["rows"]]
    names = ["DynamicCache", "StaticCache", "joined, budget 8", "joined, budget 8, decode_ahead"]
    assert rows == [(batch, name, None) for batch in (1, 3) for name in names]
    held = {(row["batch"], row["cache"]): row["cache_bytes"] for row in record["rows"]}
    assert held[3, names[2]] == 3 * held[1, names[2]]
    assert held[3, names[2]] < held[3, "DynamicCache"]
    assert all(row["tokens_per_second"] > 0 for row in record["rows"])
    assert "joined, budget 8, decode_ahead" in capsys.readouterr().out


def test_one_loop_alone_may_be_measured():
    options = ["--random-weights", "tiny", "--batches", "2", "--length", "40", "--budget", "8", "--new-tokens", "6"]
    options += ["--loops", "decode_ahead", "--repeats", "1", "--device", "cpu"]
    rows = joined.measure(joined.parse_arguments(options))["rows"]
    assert [row["cache"] for row in rows] == ["DynamicCache", "StaticCache", "joined, budget 8, decode_ahead"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--new-tokens", "4"], "the first 4 of a run are not timed"), (["--batches", "0"], "at least 1, got '0'")],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        joined.main(arguments)
    assert message in capsys.readouterr().err
