import json
import platform
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from benchmarks.speed import decoding_run, speed_and_memory
from benchmarks.speed.random_models import random_model
from tiny_llava import save_tiny_llava

SMALL = ["--device", "cpu", "--lengths", "20", "40", "--budgets", "8", "24", "--new-tokens", "6", "--repeats", "2"]
RESULTS = Path(speed_and_memory.__file__).parents[1] / "results"
SHIFTKV = ["ShiftKVCache, budget 8", "ShiftKVCache, budget 24"]
NAMES = ["DynamicCache", "StaticCache", *(name + how for name in SHIFTKV for how in ("", ", decode_ahead"))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What one run with the embedded model writes: the parsed JSON file, and the folder with it and the pictures."""
    folder = tmp_path_factory.mktemp("decode")
    options = ["--batches", "1", "2", "--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
    speed_and_memory.main([*SMALL, *options])
    return json.loads((folder / "out.json").read_text(encoding="utf-8")), folder


def test_json_holds_settings_versions_and_rows(written):
    record, _ = written
    assert record["settings"] == {
        "model": "tiny_qwen2_5_vl",
        "model_bytes": record["settings"]["model_bytes"],
        "dtype": "float32",
        "attention": "sdpa",
        "lengths": [20, 40],
        "batches": [1, 2],
        "budgets": [8, 24],
        "caches": ["dynamic", "static", "shiftkv"],
        "new_tokens": 6,
        "repeats": 2,
        "untimed_tokens": 4,
    }
    assert record["environment"]["device"] == f"cpu ({platform.processor() or platform.machine()}, threads: 1)"
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["transformers"] == transformers.__version__
    assert record["environment"]["python"] == platform.python_version()
    assert record["environment"]["triton"]
    cases = [(row["batch"], row["tokens"], row["cache"]) for row in record["rows"]]
    assert cases == [(batch, tokens, name) for batch in (1, 2) for tokens in (20, 40) for name in NAMES]


def test_every_row_has_times_and_says_that_a_cpu_compiles_nothing(written):
    for row in written[0]["rows"]:
        assert 0 < row["fastest"] <= row["milliseconds"] <= row["slowest"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["milliseconds"])
        assert row["new_tokens"] == 6
        assert row["decoding"] == "eager"
        assert row["graphs"] == row["graphs_while_measured"] == row["cudagraph_skips"] == 0
        assert row["peak_bytes"] is row["decoding_bytes"] is row["error"] is None


def test_caches_hold_what_they_were_made_for(written):
    slot = 6 * 2 * 2 * 32 * 4  # layers, keys and values, KV heads, features, bytes
    for row in written[0]["rows"]:
        slots = {
            "DynamicCache": row["tokens"] + 5,  # the last token is never put in
            "StaticCache": row["tokens"] + 6,
            "ShiftKVCache, budget 8": 8 + 6,
            "ShiftKVCache, budget 24": 24 + 6,
        }[row["cache"].removesuffix(", decode_ahead")]
        assert row["cache_bytes"] == row["batch"] * slots * slot


def test_there_are_a_picture_of_the_time_and_one_of_the_memory(written):
    assert sorted(path.name for path in written[1].iterdir()) == ["out.json", "out_memory.png", "out_time.png"]
    for name in ("out_memory.png", "out_time.png"):
        with Image.open(written[1] / name) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300


def test_the_table_has_a_line_for_each_row(capsys):
    speed_and_memory.main([*SMALL, "--random-weights", "tiny", "--batches", "1", "--caches", "dynamic", "shiftkv"])
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"tiny, random weights, float32, cpu \(.+, threads: 1\): 6 new tokens", printed[0])
    assert printed[1] == ""
    header, *lines = [re.split(r"  +", line.strip()) for line in printed[2 : printed.index("", 2)]]
    assert header[:5] == ["batch", "tokens", "cache", "decoding", "ms/token"]
    assert [line[:4] for line in lines] == [
        ["1", tokens, name, "eager"] for tokens in ("20", "40") for name in NAMES if name != "StaticCache"
    ]


def test_records_are_read_together(written, tmp_path, capsys):
    record, folder = written
    for batch in (1, 2):
        rows = [row for row in record["rows"] if row["batch"] == batch]
        (tmp_path / f"{batch}.json").write_text(json.dumps({**record, "rows": rows}))
    speed_and_memory.main(["--read", str(folder / "out.json")])
    whole = capsys.readouterr().out
    halves = [str(tmp_path / "1.json"), str(tmp_path / "2.json")]
    speed_and_memory.main(["--read", *halves, "--plot", str(tmp_path / "out.png")])
    pictures = [tmp_path / "out_time.png", tmp_path / "out_memory.png"]
    assert capsys.readouterr().out == whole + "".join(f"written: {path}\n" for path in pictures)
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in pictures)
    record["settings"] = {**record["settings"], "model": "another"}
    (tmp_path / "2.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"cannot be shown together: another, float32, cpu.*: 6 new tokens; tiny"):
        speed_and_memory.main(["--read", *halves])
    (tmp_path / "2.json").write_text("{}")
    with pytest.raises(SystemExit):
        speed_and_memory.main(["--read", *halves])
    assert "2.json' is no JSON file of speed_and_memory.py: KeyError('settings')" in capsys.readouterr().err


def test_the_records_of_this_repository_can_be_read(capsys):
    files = [str(RESULTS / name) for name in ("decoding.json", "decoding_batch_8.json")]
    speed_and_memory.main(["--read", *files])
    printed = capsys.readouterr().out
    assert printed.startswith("qwen2.5-vl-7b, random weights, bfloat16, NVIDIA H200: 256 new tokens\n")
    assert printed.count("decode_ahead") == 2 * (3 + 2)


def test_another_family(tmp_path, capsys):
    save_tiny_llava(tmp_path)
    options = ["--model", str(tmp_path), "--batches", "2", "--lengths", "30", "--caches", "shiftkv", "--attn", "eager"]
    speed_and_memory.main([*SMALL, *options])
    printed = capsys.readouterr().out
    assert re.match(rf"{tmp_path.name}, float32, cpu \(.+\): 6 new tokens\n", printed)
    assert "ShiftKVCache, budget 24" in printed


def test_lengths_need_positions(capsys):
    with pytest.raises(SystemExit, match=r"with 6 new tokens \[8187\] are more than the model's 8192 positions"):
        speed_and_memory.main([*SMALL, "--lengths", "20", "8187"])
    arguments = speed_and_memory.parse_arguments(["--device", "cpu", "--new-tokens", "7900"])
    model = decoding_run.load_model(arguments)
    assert decoding_run.fitting_lengths(model.config, arguments) == [256]
    assert "left out: with 7900 new tokens [512, 1024] are more than" in capsys.readouterr().err


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path))):
        speed_and_memory.main([*SMALL, "--model", str(tmp_path)])


def test_the_selection_is_measured_step_by_step(tmp_path, capsys):
    speed_and_memory.main(["--selection", "--tiny", "--repeats", "2", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["settings"] == {
        "selection": True,
        "lengths": [33, 64],
        "batches": [1],
        "budgets": [8],
        "repeats": 2,
        "tiny": True,
    }
    found = [(row["method"], row["budget"], row["batch"], row["tokens"]) for row in record["selection"]]
    methods = ("published", "values", "values, refitted")
    assert found == [(method, 8, 1, tokens) for tokens in (33, 64) for method in methods]
    assert [(row["cache"], row["tokens"]) for row in record["prefill"]] == [
        (cache, tokens)
        for tokens in (33, 64)
        for cache in (
            "DynamicCache",
            "ShiftKVCache 8",
            "ShiftKVCache 8, asked",
            "ShiftKVCache 8, values",
            "ShiftKVCache 8, value-aware",
        )
    ]
    assert all(row["seconds"] > 0 for row in record["prefill"])
    assert record["environment"]["torch"]
    assert "milliseconds per layer" in printed
    assert "ShiftKVCache 8" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "--lengths: needs a whole number, at least 1, got '0'"),
        (["--batches", "-1"], "--batches: needs a whole number, at least 1, got '-1'"),
        (["--budgets", "0.5"], "--budgets/--budget: needs a whole number, at least 1, got '0.5'"),
        (["--new-tokens", "4"], "--new-tokens 4: the first 4 of a run are not timed"),
        (["--repeats", "0"], "--repeats: needs a whole number"),
        (["--caches", "quantized"], "'quantized' (choose from"),
        (["--random-weights", "gpt"], "'gpt' (choose from"),
        (["--random-weights", "tiny", "--model", "x"], "--model: not allowed with argument --random-weights"),
        (["--random-weights", "tiny", "--dtype", "auto"], "--dtype auto is that of a checkpoint"),
        (["--device", "toaster"], "--device: cannot use 'toaster'"),
        (["--json", "nowhere/out.json"], "--json: no such folder: 'nowhere'"),
        (["--plot", "nowhere/out.png"], "--plot: no such folder: 'nowhere'"),
        (["--plot", "out.doc"], "--plot: 'out.doc' has no ending that matplotlib can draw: "),
        (["--read", "nowhere.json"], "--read: no such file: 'nowhere.json'"),
        (["--read", str(RESULTS / "compare.json")], "compare.json' is no JSON file of speed_and_memory.py"),
        (["--read", str(RESULTS / "decoding.json"), "--json", "x.json"], "--json goes without --read"),
        (["--read", str(RESULTS / "decoding.json"), "--selection"], "--selection goes without --read"),
        (["--tiny"], "--random-weights tiny"),
        (["--selection", "--tiny", "--lengths", "0"], "at least 1"),
        (["--selection", "--tiny", "--json", "no/x"], "no such folder: 'no'"),
        (["--selection", "--tiny", "--plot", "x.png"], "--plot goes without --selection"),
        (["--selection", "--tiny", "--random-weights", "tiny"], "--random-weights goes without --selection"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed_and_memory.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_matplotlib_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        speed_and_memory.main(["--plot", "out.png"])
    assert '--plot: needs matplotlib: pip install "mmshiftkv[plot]"' in capsys.readouterr().err


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"name='gpt' must be one of qwen2.5-vl-7b, llava-1.6-vicuna-7b, tiny"):
        random_model("gpt", None, None)
