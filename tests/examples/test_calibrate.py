import json
import sys

import pytest
from PIL import Image

import calibrate
from common import ASSETS
from mmshiftkv import Calibration, ShiftKVConfig
from tiny_llava import document_image, save_tiny_llava
from tiny_vlm.pages import HELD_OUT_SEED

PAGE = str(ASSETS / "document_1.png")
SMALL = ["--count", "2", "--max-new-tokens", "6", "--device", "cpu"]


def test_table_json_and_plot_of_the_embedded_model(tmp_path, capsys):
    calibrate.main([*SMALL, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")])
    calibration = Calibration.load(tmp_path / "out.json")
    assert capsys.readouterr().out == f"{calibration}\n"
    assert calibration.prompts == 2
    assert len(ShiftKVConfig(budget=64, gamma=calibration.gamma()).gamma) == 6
    assert all(0.5 < ratio < 2 for ratio in calibration.ratios)
    assert len(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["layers"]) == 6
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"


def test_a_run_can_be_repeated_and_writes_nothing_unasked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = []
    for _ in range(2):
        calibrate.main([*SMALL, "--builtin-font-only"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert list(tmp_path.iterdir()) == []


def test_images_and_questions_for_any_checkpoint(tmp_path, capsys):
    save_tiny_llava(tmp_path)
    files = []
    for size in [(300, 100), (112, 112)]:
        files.append(str(tmp_path / f"{size[0]}.png"))
        document_image(*size).save(files[-1])
    fixed = ["--model", str(tmp_path), "--max-new-tokens", "4", "--device", "cpu", "--image", *files, "--question"]
    calibrate.main([*fixed, "What is due?"])
    one = capsys.readouterr().out
    assert one.splitlines()[-1].startswith("2 prompts, ")
    assert len(one.splitlines()) == 1 + 4 + 1
    calibrate.main([*fixed, "What is due?", "What is due?"])
    assert capsys.readouterr().out == one
    calibrate.main([*fixed, "What is due?", "Which is the largest number?"])
    assert capsys.readouterr().out != one


def test_the_documents_are_not_those_of_the_test_set():
    assert calibrate.DOCUMENTS_SEED == HELD_OUT_SEED + 1  # variations.py has the next one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", PAGE], "--image and --question need each other"),
        (["--question", "Why?"], "--image and --question need each other"),
        (["--image", PAGE, PAGE, "--question", "A?", "B?", "C?"], "--question: 3 for 2 images; one or as many"),
        (["--image", "missing.png", "--question", "Why?"], "argument --image: no such file: 'missing.png'"),
        (["--image", __file__, "--question", "Why?"], f"argument --image: not an image that can be read: {__file__!r}"),
        (["--max-new-tokens", "1"], "--max-new-tokens 1: the first token comes of the prompt"),
        (["--count", "0"], "argument --count: needs a whole number, at least 1, got '0'"),
        (["--json", "nowhere/out.json"], "argument --json: no such folder: 'nowhere'"),
        (["--plot", "nowhere/out.png"], "argument --plot: no such folder: 'nowhere'"),
        (["--plot", "out.doc"], "argument --plot: 'out.doc' has no ending that matplotlib can draw"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        calibrate.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--plot", "out.png", "--builtin-font-only"], []])
def test_missing_matplotlib_is_named(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        calibrate.main(arguments)
    assert 'needs matplotlib: pip install "mmshiftkv[plot]"' in f"{stopped.value} {capsys.readouterr().err}"
