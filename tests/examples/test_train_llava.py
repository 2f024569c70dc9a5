import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from tiny_vlm.answering import build_inputs
from tiny_vlm.architectures import ARCHITECTURES
from tiny_vlm.batches import IGNORE
from tiny_vlm.document_questions import TASKS, held_out_examples
from tiny_vlm.layouts import random_document
from tiny_vlm.llava_batches import BATCH, PREFIX_HEAD, PREFIX_TAIL, make_batch, prefix_length, stage, tile_characters
from tiny_vlm.llava_build import PATCHES, TILE_SHAPES, build_model, build_processor
from tiny_vlm.llava_forward import FastForward, check_against_reference
from tiny_vlm.pixels import paint
from tiny_vlm.state import Record, load_state, save_state
from tiny_vlm.step import Step
from tiny_vlm.tiles import cut
from tiny_vlm.train import main
from tiny_vlm.training import Schedule

SMALL_RUN = ["--model", "llava", "--shrink", "64", "--workers", "0", "--no-compile", "--no-graphs", "--warmup", "1"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model().train()


@pytest.fixture(scope="module")
def batch():
    return make_batch(random.Random(0), progress=0.1, shrink=64)


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def new_step(model):
    return Step(model, ARCHITECTURES["llava"].fast_forward(model, torch.float32, False), "cpu", aux=0.5, graphs=False)


def test_a_run_goes_on_where_another_ended(tmp_path):
    plan = ["--log-every", "1", "--seconds", "500", "--planned-seconds", "1000"]
    main(["--out", str(tmp_path / "one"), "--steps", "2", *plan, *SMALL_RUN])
    main(["--out", str(tmp_path / "two"), "--steps", "1", "--resume", str(tmp_path / "one/state"), *plan, *SMALL_RUN])
    first, second, third = rows_of(tmp_path / "one") + rows_of(tmp_path / "two")
    assert (first["step"], second["step"], third["step"]) == (1, 2, 3)
    assert third["images"] == 6
    assert 0 == first["share"] == second["share"] < third["share"] < 0.1
    assert set(first["token_accuracy"]) == set(TASKS)
    # Among 261 tokens a uniform guess has a loss of 5.6; two steps make it a little better.
    assert 5 < first["loss"] < 7
    assert third["loss"] < first["loss"]
    record = json.loads((tmp_path / "two/state/record.json").read_text())
    assert (record["model"], record["steps"], record["runs"]) == ("llava", 3, 2)
    assert all(path.stat().st_size < 15_100_000 for path in (tmp_path / "two/state").iterdir())
    trained = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "two", dtype="auto")
    assert trained.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(tmp_path / "two").tokenizer("A").input_ids == [257, 65]


def test_a_resumed_training_is_the_same_up_to_the_rounding_of_the_moments(tmp_path, batch):
    torch.manual_seed(1)
    going = new_step(build_model())
    for _ in range(3):
        going(batch, 1e-3)
    save_state(tmp_path / "state", going, Record("llava", steps=3))
    torch.manual_seed(2)
    resumed = new_step(build_model())
    load_state(tmp_path / "state", resumed, Record("llava", steps=3))
    before = {name: value.detach().clone() for name, value in going.named_parameters.items()}
    assert all(torch.equal(before[name], value) for name, value in resumed.named_parameters.items())
    for step in (going, resumed):
        torch.manual_seed(3)  # of the noise on the pages
        step(batch, 1e-3)
    for name, value in going.named_parameters.items():
        # Moments in bfloat16 have 8 bits: the step itself is right to about 1 %, and is at most about 1e-3.
        assert torch.allclose(value, resumed.named_parameters[name], atol=3e-5), name
    moved = sum(not torch.equal(before[name], value) for name, value in going.named_parameters.items())
    assert moved >= len(before) - 2  # all but the tower's last norm, which LLaVA-NeXT does not use


def test_the_state_of_another_model_is_refused(tmp_path):
    (tmp_path / "record.json").write_text('{"model": "llava"}')
    with pytest.raises(ValueError, match=r"--model is 'qwen', but .* holds the training of 'llava'"):
        main(["--out", str(tmp_path / "out"), "--resume", str(tmp_path), "--workers", "0"])


def test_the_schedule_counts_the_time_of_earlier_runs():
    schedule = Schedule(seconds=1e6, planned=1000.0, done=250.0)
    assert schedule.share(step=1) == 0.25
    assert 0.25 <= schedule.share(step=2) < 0.26
    assert Schedule(seconds=1e6, planned=1000.0, done=1000.0).share(step=2) is None


def test_the_fast_forward_pass_agrees_with_the_unpatched_model(model):
    assert check_against_reference(model, "cpu") < 1e-3


def test_a_forward_pass_that_differs_is_refused(model, monkeypatch):
    rope = FastForward.rope
    monkeypatch.setattr(FastForward, "rope", lambda self, prefix, offsets: rope(self, prefix, offsets + 1))
    with pytest.raises(RuntimeError, match="the fast forward pass differs"):
        check_against_reference(model, "cpu")


def test_segments_do_not_see_one_another(model, batch):
    forward = FastForward(model, torch.float32, compiled=False)
    pixels = paint(batch)
    with torch.no_grad():
        before, _ = forward(pixels, batch["inputs"], batch["offsets"], batch["segments"])
        changed = torch.where(batch["segments"] == 0, batch["inputs"] % 50 + 60, batch["inputs"])
        after, _ = forward(pixels, changed, batch["offsets"], batch["segments"])
    others = batch["segments"] > 0
    assert torch.allclose(before[others], after[others], atol=1e-4)
    assert not torch.allclose(before[~others], after[~others], atol=0.1)


@pytest.mark.parametrize("number", [0, 5, 10, 15])
def test_prompts_and_tiles_are_those_of_the_processor(number):
    example = list(held_out_examples(number + 1))[number]
    processor = build_processor()
    inputs = build_inputs(processor, [example.image], [example.question])
    pages = torch.from_numpy(np.array(example.image)).permute(2, 0, 1)[None].float()
    difference = (cut(pages) - inputs["pixel_values"]).abs()
    assert difference[:, 1:].max() < 1e-5
    assert difference[:, 0].max() < 1.1 / 255 / 0.26  # the resized view may be rounded to the next whole number
    ids = inputs["input_ids"][0].tolist()
    prefix = prefix_length(*pages.shape[-2:])
    assert 1_300 < len(ids) < 2_700
    assert tuple(ids[: len(PREFIX_HEAD)]) == PREFIX_HEAD
    assert set(ids[len(PREFIX_HEAD) : prefix - len(PREFIX_TAIL)]) == {processor.image_token_id}
    assert bytes(ids[prefix:]).decode() == f"{example.question} [/INST]"


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.2, 0.5])
def test_every_stage_gives_batches_of_one_size(progress):
    made = make_batch(random.Random(1), progress, shrink=64)
    count, height, width = made["cover"].shape
    assert count == 2
    assert (height, width) in stage(progress).sizes
    assert (prefix_length(height, width) + made["inputs"].shape[1]) % 8 == 0
    assert made["characters"].shape == (count, height * width // 224**2, PATCHES**2, 3)
    assert (made["targets"] != IGNORE).any(1).all()


def test_every_page_size_can_be_cut_without_resizing():
    assert set(BATCH) <= set(TILE_SHAPES)


def test_characters_of_the_tiles_spell_the_page():
    document = random_document(random.Random(4), 448, 448, ["list"])
    tiles = tile_characters(document)
    assert tiles.shape == (4, 256, 3)
    rows = tiles.reshape(2, 2, PATCHES, PATCHES, 3).swapaxes(1, 2).reshape(2 * PATCHES, -1)
    spelled = ["".join(map(chr, row[row > 0])) for row in rows]
    assert [text for text in spelled if text] == [line.text.replace(" ", "") for line in document.lines]
