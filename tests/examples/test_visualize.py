import sys

import pytest
from PIL import Image

import visualize
from common import ASSETS, METHOD_NAMES, TINY_LLAVA, sample_documents
from mmshiftkv import METHODS
from tiny_llava import FAMILIES, document_image, save_tiny_llava


def run(capsys, folder, *arguments):
    """The lines that the script prints, and the size of the picture that it writes."""
    visualize.main(["--device", "cpu", "--output", str(folder / "out.png"), *arguments])
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"written: {folder / 'out.png'}"
    with Image.open(folder / "out.png") as image:
        assert image.format == "PNG"
        return lines, image.size


def test_the_sample_document(capsys, tmp_path):
    (line, full), _ = run(capsys, tmp_path, "--budget", "128")
    truth = next(iter(sample_documents().values()))[0]["answer"]
    assert line.startswith(f"ShiftKV, budget 128, right answer: {truth}; ")
    assert line.endswith(" % of the kept tokens are visual")
    assert full == f"full cache, right answer: {truth}"


def test_answers_that_are_wrong_are_called_so_beside_the_true_one(capsys, tmp_path):
    (line, full), _ = run(capsys, tmp_path, "--budget", "128", "--max-new-tokens", "2")
    truth = next(iter(sample_documents().values()))[0]["answer"]
    assert line.startswith(f"ShiftKV, budget 128, wrong answer: {truth[:2]}; ")
    assert full == f"full cache, wrong answer: {truth[:2]}; true answer: {truth}"


def test_the_figure_says_method_budget_answer_and_whether_it_is_right():
    arguments = visualize.parse_arguments(["--device", "cpu", "--budget", "128", "--methods", "shiftkv", "random"])
    figure = visualize.draw(arguments)
    title, *headings = [text.get_text() for text in figure.texts]
    question, truth = next(iter(sample_documents().values()))[0].values()
    assert title == f"{question}\nfull cache, right answer: {truth}"
    assert headings[:2] == ["ShiftKV, budget 128", f"\u2713 right answer: {truth}"]
    assert headings[3] == "Random, budget 128"
    assert headings[4].startswith("\u2717 wrong answer: ")


def test_methods_stand_side_by_side(capsys, tmp_path):
    _, alone = run(capsys, tmp_path, "--max-new-tokens", "12")
    names = [name for name in METHODS if name != "full"]
    lines, together = run(capsys, tmp_path, "--max-new-tokens", "12", "--methods", *names, names[0])
    assert [line.split(",")[0] for line in lines] == [*(METHOD_NAMES[name] for name in names), "full cache"]
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
    (line, full), _ = run(capsys, tmp_path, *arguments, "--budget", "0.2", "--max-new-tokens", "3")
    assert line.startswith("ShiftKV, budget 0.2, answer: ")
    assert full.startswith("full cache, answer: ")


def test_the_tiles_of_the_second_embedded_model(capsys, tmp_path):
    lines, _ = run(capsys, tmp_path, "--model", "llava", "--budget", "512")
    truth = next(iter(sample_documents(str(TINY_LLAVA)).values()))[0]["answer"]
    assert lines[0].startswith(f"ShiftKV, budget 512, right answer: {truth}; ")


def test_a_layer_that_is_not_there_is_told_those_that_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        visualize.main(["--device", "cpu", "--max-new-tokens", "1", "--layer", "6"])
    assert "layer=6 must be one of the compressed layers 0, 1, 2, 3, 4, 5" in str(stopped.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "'magic' (choose from"),
        (["--methods", "full"], "'full' (choose from"),
        (["--image", str(ASSETS / "document_2.png")], "--image needs a --question"),
        (["--image", __file__, "--question", "Why?"], f"argument --image: not an image that can be read: {__file__!r}"),
        (["--image", "missing.png", "--question", "Why?"], "argument --image: no such file: 'missing.png'"),
        (["--budget", "0"], "at least 1, or a fraction of the prompt in (0, 1], got '0'"),
        (["--layer", "first"], "argument --layer: invalid int value: 'first'"),
        (["--output", "nowhere/out.png"], "argument --output: no such folder: 'nowhere'"),
        (["--output", "out.doc"], "argument --output: 'out.doc' has no ending that matplotlib can draw"),
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
    assert 'needs matplotlib: pip install "mmshiftkv[plot]"' in capsys.readouterr().err
