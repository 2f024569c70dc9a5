import json
import sys

import pytest
from PIL import Image

import visualize
from mmshiftkv import METHODS
from tiny_llava import FAMILIES, document_image, save_tiny_llava

DOCUMENTS = json.loads((visualize.ASSETS / "documents.json").read_text(encoding="utf-8"))


def run(capsys, folder, *arguments):
    """The lines that the script prints, and the size of the picture that it writes."""
    visualize.main(["--device", "cpu", "--output", str(folder / "out.png"), *arguments])
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"written: {folder / 'out.png'}"
    with Image.open(folder / "out.png") as image:
        assert image.format == "PNG"
        return lines, image.size


def test_the_sample_document(capsys, tmp_path):
    (line,), _ = run(capsys, tmp_path, "--budget", "128")
    truth = next(iter(DOCUMENTS.values()))[0]["answer"]
    assert line.startswith("shiftkv: ")
    assert line.endswith(f" % of the kept tokens are visual; answer: {truth}")


def test_methods_stand_side_by_side(capsys, tmp_path):
    _, alone = run(capsys, tmp_path, "--max-new-tokens", "2")
    names = [name for name in METHODS if name != "full"]
    lines, together = run(capsys, tmp_path, "--max-new-tokens", "2", "--methods", *names, names[0])
    assert [line.split(":")[0] for line in lines] == names
    assert together[1] == alone[1]
    assert together[0] > 0.7 * len(names) * alone[0]


def test_one_layer(capsys, tmp_path):
    shares = {run(capsys, tmp_path, "--max-new-tokens", "2", "--layer", str(layer))[0][0] for layer in range(3)}
    assert len(shares) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_llava_next(capsys, tmp_path, family):
    save_tiny_llava(tmp_path, family)
    document_image(300, 100).save(tmp_path / "page.png")
    arguments = ["--model", str(tmp_path), "--image", str(tmp_path / "page.png"), "--question", "What is due?"]
    (line,), _ = run(capsys, tmp_path, *arguments, "--budget", "0.2", "--max-new-tokens", "3")
    assert line.startswith("shiftkv: ")


def test_a_layer_that_is_not_there_is_told_those_that_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        visualize.main(["--device", "cpu", "--max-new-tokens", "1", "--layer", "6"])
    assert "layer=6 must be one of the compressed layers 0, 1, 2, 3, 4, 5" in str(stopped.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "'magic' (choose from"),
        (["--methods", "full"], "'full' (choose from"),
        (["--image", __file__], "--image needs a --question"),
        (["--image", "missing.png", "--question", "Why?"], "argument --image: no such file: 'missing.png'"),
        (["--budget", "0"], "at least 1, or a fraction of the prompt in (0, 1], got '0'"),
        (["--layer", "first"], "argument --layer: invalid int value: 'first'"),
        (["--output", "nowhere/out.png"], "argument --output: no such folder: 'nowhere'"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        visualize.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_matplotlib_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        visualize.main([])
    assert 'drawing needs matplotlib: pip install "mmshiftkv[plot]"' in capsys.readouterr().err
