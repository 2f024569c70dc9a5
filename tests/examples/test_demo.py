import importlib.util

import pytest

from common import ASSETS, TINY_MODEL, sample_documents
from tiny_vlm.answering import load

if importlib.util.find_spec("gradio") is None:
    pytest.skip("needs gradio", allow_module_level=True)

from gradio_client import Client, handle_file

import demo

PAGE = str(ASSETS / "document_1.png")


@pytest.fixture(scope="module")
def client():
    page = demo.build_page(demo.Demo(*load(TINY_MODEL), max_new_tokens=24))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield Client(address, verbose=False)
    page.close()


def test_both_answers_come_word_by_word_with_times_bytes_and_a_heat_map(client):
    sample = sample_documents()["document_1.png"][0]
    job = client.submit(handle_file(PAGE), sample["question"], 128, "ShiftKV, value-aware", api_name="/compare")
    full, compressed, table, heat_map = job.result(timeout=120)
    assert full == compressed == sample["answer"]
    assert table["headers"] == demo.HEADER
    names, times, kept, sizes = zip(*table["data"], strict=True)
    assert (names, kept) == (("full", "budget 128"), ("399", "128"))
    assert all(float(milliseconds) > 0 for milliseconds in times)
    assert all(size.endswith("iB") for size in sizes)
    assert heat_map["plot"].startswith("data:image")
    outputs = job.outputs()
    assert [output[0] for output in outputs[:3]] != [full] * 3
    assert any(output[0] == full and output[1] == "" for output in outputs) or len(outputs) > 3


@pytest.mark.parametrize(
    ("picture", "question", "method", "message"),
    [
        (None, "What is the Invoice?", "SnapKV", "There is no image yet"),
        (PAGE, " ", "SnapKV", "has no words"),
    ],
)
def test_errors_are_shown_in_the_page(client, picture, question, method, message):
    picture = None if picture is None else handle_file(picture)
    with pytest.raises(Exception, match=message):
        client.predict(picture, question, 64, method, api_name="/compare")
    # and the next one is answered
    answers = client.predict(handle_file(PAGE), "What is the Name?", 64, "ShiftKV", api_name="/compare")
    assert answers[0] == "hiluto"


def test_help_needs_nothing(capsys):
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    assert "--port" in capsys.readouterr().out
