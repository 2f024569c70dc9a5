import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import qwen2_5_vl
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, Qwen2_5_VLForConditionalGeneration

from mmshiftkv import ShiftKVCache

ASSETS = Path(qwen2_5_vl.__file__).parent / "assets"
CHECKPOINT = str(ASSETS / "tiny_qwen2_5_vl")
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
    name, seen, stored, *_ = table.splitlines()[-1].split()
    assert name == "all"
    return answer, int(seen), int(stored)


def generate(model, processor, inputs, cache):
    """The new text and all tokens of a greedy `generate` call."""
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
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


@pytest.mark.parametrize("budget", [4096, 48])
def test_a_second_turn_continues_the_conversation(model, processor, budget):
    """The whole conversation as text, without pixels: `generate` drops what the cache has seen."""
    image = str(ASSETS / "document_1.png")
    first = qwen2_5_vl.build_messages([image], None, QUESTION)
    full, compressed = DynamicCache(), ShiftKVCache(model, budget=budget)
    answers = {}
    for cache in (full, compressed):
        inputs = qwen2_5_vl.build_inputs(processor, first)
        told, _ = generate(model, processor, inputs, cache)
        second = [*first, {"role": "assistant", "content": [{"type": "text", "text": told}]}, *ask("Read line 2.")]
        inputs = qwen2_5_vl.build_inputs(processor, second)
        fresh, _ = generate(model, processor, inputs, DynamicCache())
        # The fresh run has left the same offset of image positions on the model, which the second turn needs.
        inputs.pop("pixel_values")
        answer, tokens = generate(model, processor, inputs, cache)
        assert cache.get_seq_length() == tokens.shape[1] - 1
        answers[cache] = told, answer, fresh
    told, answer, fresh = answers[full]
    assert answer == fresh != ""
    if budget == 4096:
        assert answers[compressed] == answers[full]
    else:
        assert compressed.kept_indices(0).shape[-1] == budget
        assert compressed.report().tokens_stored < compressed.report().tokens_seen


def ask(question):
    return [{"role": "user", "content": [{"type": "text", "text": question}]}]
