import sys
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, Qwen2_5_VLForConditionalGeneration

import qwen2_5_vl
from common import ASSETS, TINY_MODEL
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache

CHECKPOINT = str(TINY_MODEL)
PAGE = str(ASSETS / "document_1.png")
QUESTION = "Read line 1."
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def model():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="float32")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four small pages in files, cut from the sample documents."""
    folder = tmp_path_factory.mktemp("pages")
    documents = sorted(ASSETS.glob("document_*.png"))
    paths = []
    for number in range(4):
        page = Image.open(documents[number % len(documents)]).crop((0, 28 * number, 224, 28 * number + 168))
        paths.append(str(folder / f"{number}.png"))
        page.save(paths[-1])
    return paths


def run(capsys, *arguments):
    """The answer and the last row of the report, as (seen, stored), that the script prints."""
    fixed = ["--model", CHECKPOINT, "--dtype", "float32", "--device-map", "cpu", "--question", QUESTION]
    qwen2_5_vl.main([*fixed, "--max-new-tokens", str(NEW_TOKENS), *arguments])
    answer, table = capsys.readouterr().out.split("\nlayer ", maxsplit=1)
    (row,) = (line.split() for line in table.splitlines() if line.split()[0] == "all")
    _, seen, stored, *_ = row
    return answer, int(seen), int(stored)


def generate(model, processor, inputs, cache):
    """The new text and all tokens of a greedy `generate` call."""
    output = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=NEW_TOKENS, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), output


def visual_arguments(images, frames):
    return [part for image in images for part in ("--image", image)] + [
        part for frame in frames for part in ("--frame", frame)
    ]


@pytest.mark.parametrize(("images", "frames"), [(1, 0), (2, 0), (0, 4), (0, 3), (1, 2)])
def test_a_budget_that_covers_the_prompt_gives_the_answer_of_the_full_cache(
    capsys, model, processor, files, images, frames
):
    images, frames = files[:images], files[:frames]
    inputs = qwen2_5_vl.build_inputs(processor, qwen2_5_vl.build_messages(images, frames, QUESTION))
    assert len(inputs.get("image_grid_thw", [])) == len(images)
    assert ("video_grid_thw" in inputs) == bool(frames)
    expected, _ = generate(model, processor, inputs, cache := DynamicCache())
    answer, seen, stored = run(capsys, *visual_arguments(images, frames), "--budget", "4096")
    assert answer == expected
    assert seen == stored == cache.get_seq_length()


@pytest.mark.parametrize(("images", "frames"), [(2, 0), (0, 4)])
def test_a_small_budget_keeps_that_many_prompt_tokens(capsys, processor, files, images, frames):
    images, frames = files[:images], files[:frames]
    inputs = qwen2_5_vl.build_inputs(processor, qwen2_5_vl.build_messages(images, frames, QUESTION))
    _, seen, stored = run(capsys, *visual_arguments(images, frames), "--budget", "32")
    assert seen - stored == inputs["input_ids"].shape[1] - 32


def test_frames_become_one_video_at_two_frames_a_second(model, processor, files):
    inputs = qwen2_5_vl.build_inputs(processor, qwen2_5_vl.build_messages([], files, QUESTION))
    assert inputs["video_grid_thw"].shape == (1, 3)
    assert inputs["video_grid_thw"][0, 0] == 2
    assert inputs["second_per_grid_ts"].tolist() == [1.0]
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == inputs["video_grid_thw"].prod() // 4


def message(role, *content):
    return {"role": role, "content": list(content)}


def converse(model, processor, cache):
    """Two questions about one image: both answers, all tokens, and the inputs of the second turn with its pixels.

    The second turn is given the whole conversation as text but no pixels: `generate` drops what the cache has seen.
    """
    messages = qwen2_5_vl.build_messages([str(ASSETS / "document_1.png")], None, QUESTION)
    first, _ = generate(model, processor, qwen2_5_vl.build_inputs(processor, messages), cache)
    messages.append(message("assistant", {"type": "text", "text": first}))
    messages.append(message("user", {"type": "text", "text": "Read line 3."}))
    inputs = qwen2_5_vl.build_inputs(processor, messages)
    second, tokens = generate(model, processor, {k: v for k, v in inputs.items() if k != "pixel_values"}, cache)
    return first, second, tokens, inputs


def test_a_second_turn_gives_what_the_full_cache_gives(model, processor):
    first, second, tokens, inputs = converse(model, processor, DynamicCache())
    assert generate(model, processor, inputs, DynamicCache())[0] == second
    compressed = ShiftKVCache(model, budget=4096)
    assert converse(model, processor, compressed)[:2] == (first, second)
    assert compressed.report().tokens_stored == tokens.shape[1] - 1


def test_a_second_turn_on_a_compressed_prompt_is_stored_whole(model, processor):
    cache = ShiftKVCache(model, budget=48)
    _, _, tokens, _ = converse(model, processor, cache)
    assert cache.kept_indices(0).shape[-1] == 48
    first_prompt = qwen2_5_vl.build_messages([str(ASSETS / "document_1.png")], None, QUESTION)
    dropped = qwen2_5_vl.build_inputs(processor, first_prompt)["input_ids"].shape[1] - 48
    assert cache.get_seq_length() == tokens.shape[1] - 1
    assert cache.report().tokens_stored == tokens.shape[1] - 1 - dropped


def test_a_second_turn_can_bring_an_image_if_it_brings_the_positions(model, processor):
    """`generate` computes positions from all images but encodes only those of the new turn, so it needs to be told."""
    messages = qwen2_5_vl.build_messages([str(ASSETS / "document_1.png")], None, QUESTION)
    first = qwen2_5_vl.build_inputs(processor, messages)
    answers = []
    for cache in (DynamicCache(), ShiftKVCache(model, budget=4096)):
        told, _ = generate(model, processor, first, cache)
        second = qwen2_5_vl.build_messages([str(ASSETS / "document_2.png")], None, QUESTION)
        turns = [*messages, message("assistant", {"type": "text", "text": told}), *second]
        inputs = qwen2_5_vl.build_inputs(processor, turns)
        answers.append(generate(model, processor, inputs, DynamicCache())[0])

        visual, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
        text = torch.arange(visual.shape[-1]).expand(1, 1, -1)
        inputs["position_ids"] = torch.cat([text, visual])
        inputs["pixel_values"] = inputs["pixel_values"][first["pixel_values"].shape[0] :]
        inputs["image_grid_thw"] = inputs["image_grid_thw"][1:]
        answers.append(generate(model, processor, inputs, cache)[0])
    assert len(set(answers)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs an --image, a --video or several --frame"),
        (["--image", "missing.png"], "argument --image: no such file: 'missing.png'"),
        (["--frame", PAGE, "--video", __file__], "argument --video: not allowed with argument --frame"),
        (["--image", __file__], f"argument --image: not an image that can be read: {__file__!r}"),
        (["--frame", __file__], f"argument --frame: not an image that can be read: {__file__!r}"),
        (["--image", PAGE, "--budget", "0"], "argument --budget: "),
        (["--image", PAGE, "--device-map", "abacus"], "argument --device-map: cannot use 'abacus'"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        qwen2_5_vl.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(bool(find_spec("torchcodec") or find_spec("decord")), reason="video files can be read here")
def test_a_video_is_refused_with_what_reading_it_needs():
    with pytest.raises(SystemExit) as stopped:
        qwen2_5_vl.main(["--video", __file__])
    assert str(stopped.value).startswith(
        "error: --video needs torchcodec (pip install torchcodec) and FFmpeg's libraries"
    )


@pytest.mark.skipif(not (find_spec("torchcodec") or find_spec("decord")), reason="video files cannot be read here")
def test_a_file_that_is_no_video_is_refused():
    with pytest.raises(SystemExit, match=r"^error: (not a video that can be read|torchcodec does not load)"):
        qwen2_5_vl.main(["--video", __file__])


@pytest.mark.parametrize("package", ["accelerate", "qwen_vl_utils", "torchvision"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        qwen2_5_vl.main(["--image", PAGE])
    assert stopped.value.code == f'error: needs {package}: pip install "mmshiftkv[vision]"'
