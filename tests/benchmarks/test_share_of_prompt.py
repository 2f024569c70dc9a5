from pathlib import Path

import pytest
from PIL import Image

from benchmarks.quality import share_of_prompt
from benchmarks.quality.share_of_prompt import Curves, draw, table
from common import TINY_MODEL

RESULTS = Path(share_of_prompt.__file__).parents[1] / "results"
ONE = Curves("one", 400, 1.0, {"shiftkv": [(0.1, 0.25), (0.2, 0.5)]})
OTHER = Curves("other", 2000, 0.5, {"shiftkv": [(0.1, 0.25)], "snapkv": [(0.4, 0.5)]})


def test_the_table_holds_each_point_against_the_full_cache():
    rows = [line.split() for line in table([ONE, OTHER]).splitlines() if line]
    assert rows[1:] == [
        ["one", "shiftkv", "10.0", "25.0", "25.0"],
        ["one", "shiftkv", "20.0", "50.0", "50.0"],
        ["other", "shiftkv", "10.0", "25.0", "50.0"],
        ["other", "snapkv", "40.0", "50.0", "100.0"],
    ]


def test_models_have_lines_of_their_own():
    (panel,) = draw([ONE, OTHER]).axes
    lines = [line for line in panel.lines if line.get_label().endswith("tokens)")]
    assert [line.get_label() for line in lines] == [
        "ShiftKV, one (400 tokens)",
        "ShiftKV, other (2000 tokens)",
        "SnapKV, other (2000 tokens)",
    ]
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()


def test_a_record_s_points_are_budgets_by_the_mean_length_of_its_prompts(tmp_path, capsys):
    length = share_of_prompt.prompt_length(TINY_MODEL, ["lookup", "multi", "line", "all"], 20240317)
    assert 370 < length < 385
    files = [str(RESULTS / name) for name in ("compare.json", "compare_values.json")]
    share_of_prompt.main(["--read", *files, "--plot", str(tmp_path / "share.png")])
    assert f"  {100 * 128 / length:.1f}  " in capsys.readouterr().out
    with Image.open(tmp_path / "share.png") as image:
        assert image.format == "PNG"


def test_more_models_than_can_be_told_apart_are_refused(tmp_path, capsys):
    read = ["--read", str(RESULTS / "compare.json")] * 4
    with pytest.raises(SystemExit):
        share_of_prompt.main([*read, "--plot", str(tmp_path / "share.png")])
    assert "at most 3 models" in capsys.readouterr().err
