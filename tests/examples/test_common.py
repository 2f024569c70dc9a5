import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import mmshiftkv

EXAMPLES = Path(common.__file__).parent
SCRIPTS = ["quickstart", "qwen2_5_vl", "llava_next", "visualize", "calibrate", "evaluate_lmms", "tiny_vlm/train"]
HELP = """
import runpy, sys
script = sys.argv[1]
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    slow = {"torch", "transformers", "mmshiftkv", "matplotlib", "numpy", "PIL"}
    print(*sorted(slow & set(sys.modules)), file=sys.stderr)
"""


def python(*arguments, **environment):
    """The ended run of a Python of its own that finds the scripts' modules, without network."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_docstring_and_imports_nothing_slow(name):
    script = EXAMPLES / f"{name}.py"
    ended = python("-c", HELP, str(script))
    documentation = script.read_text(encoding="utf-8").split('"""')[1].strip()
    assert documentation in ended.stdout
    assert (ended.returncode, ended.stderr) == (0, "\n")


def test_the_methods_are_those_of_the_package():
    assert common.METHODS == mmshiftkv.METHODS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such"], "error: 'no/such' is not a folder, and the Hugging Face hub cannot be asked for it"),
        (["--model", "./nowhere"], "error: no such folder: './nowhere'"),
        (
            ["--model", str(common.ASSETS)],
            f"error: no checkpoint in the folder '{common.ASSETS}': it has no config.json",
        ),
    ],
)
def test_a_model_that_is_not_there_is_one_line(arguments, message):
    ended = python(str(EXAMPLES / "llava_next.py"), "--image", str(common.ASSETS / "document_1.png"), *arguments)
    assert ended.returncode == 1
    assert ended.stderr.startswith(message)
    assert ended.stderr.count("\n") == 1


def test_a_folder_with_a_checkpoint_is_taken():
    common.needs_checkpoint(str(common.TINY_MODEL))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("convert", [common.choose_device, common.device_map])
def test_a_gpu_that_is_not_there_is_refused(convert):
    with pytest.raises(argparse.ArgumentTypeError, match=r'cannot use \'cuda\' \(.+\); "cpu" always works'):
        convert("cuda")
    with pytest.raises(argparse.ArgumentTypeError, match="cannot use 'abacus'"):
        convert("abacus")


def test_devices_that_are_there_are_taken():
    assert common.choose_device("cpu") == torch.device("cpu")
    assert common.choose_device("auto").type in ("cpu", "cuda")
    assert common.device_map("cpu") == "cpu"
    assert common.device_map("auto") == "auto"


def test_only_images_that_can_be_read_are_taken(tmp_path):
    whole = common.ASSETS / "document_1.png"
    assert common.image_file(str(whole)) == str(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:1000])
    for name in (str(cut), __file__):
        with pytest.raises(argparse.ArgumentTypeError, match="not an image that can be read"):
            common.image_file(name)


def test_only_formats_that_matplotlib_draws_are_taken(tmp_path):
    assert common.picture_file(str(tmp_path / "out.SVG")) == tmp_path / "out.SVG"
    for name in ("out", "out.doc"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=rf"'{name}' has no ending that matplotlib can draw: .*\.png"
        ):
            common.picture_file(str(tmp_path / name))


@pytest.mark.parametrize(
    ("message", "shown"),
    [("too\n  bad\n", "error: too bad"), ("too bad.\n" + "One of:\n" * 99, "error: too bad.")],
)
def test_an_error_is_one_line_and_a_long_one_is_cut(message, shown):
    with pytest.raises(SystemExit) as stopped, common.errors_in_one_line():
        raise ValueError(message)
    assert stopped.value.code == shown


def test_true_answers_are_those_of_the_sample_documents(tmp_path):
    assert {"document_1.png", "form.png"} <= set(common.all_sample_documents())
    for name, samples in common.all_sample_documents().items():
        for sample in samples:
            assert common.true_answer(str(common.ASSETS / name), sample["question"]) == sample["answer"]
    assert common.true_answer(str(common.ASSETS / "document_1.png"), "Why?") is None
    assert common.true_answer(str(tmp_path / "document_1.png"), "What is the Invoice?") is None


def test_the_small_models_have_names_and_documents_of_their_own():
    assert common.named_model("llava") == str(common.TINY_LLAVA)
    assert common.named_model("org/name") == "org/name"
    assert "form.png" in common.sample_documents(common.named_model("llava"))
    assert common.sample_documents("org/name") == common.sample_documents(common.named_model("qwen"))
