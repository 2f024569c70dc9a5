import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from common import TINY_MODEL
from tiny_vlm.batches import (
    ANSWER_START,
    END,
    IGNORE,
    PREFIX_HEAD,
    character_targets,
    make_batch,
    pack_segments,
    stages,
)
from tiny_vlm.build import MERGE, PATCH
from tiny_vlm.documents import sample_page
from tiny_vlm.forward import FastForward, check_against_reference
from tiny_vlm.pages import TASKS
from tiny_vlm.pixels import paint, patchify, two_frames
from tiny_vlm.train import main, parse
from tiny_vlm.training import Schedule, learning_rate

SMALL_RUN = ["--shrink", "64", "--workers", "0", "--no-compile", "--no-graphs", "--warmup", "1"]


@pytest.fixture(scope="module")
def batch():
    return make_batch(random.Random(0), progress=0.1, shrink=60)


def test_two_steps_write_a_checkpoint_that_loads(tmp_path, capsys):
    main(["--out", str(tmp_path), "--steps", "2", "--log-every", "1", *SMALL_RUN])
    output = capsys.readouterr().out
    assert "5,912,000 parameters" in output
    assert "2 steps, 6 images" in output
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (1, 2)
    assert (first["images"], second["images"]) == (3, 6)
    # A model that knows nothing yet: near the loss of a uniform guess among 264 tokens, and no letter right.
    assert 5 < first["loss"] < 7
    assert set(first["token_accuracy"]) == set(TASKS)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer("A").input_ids == [65]


def test_training_goes_on_from_a_checkpoint(tmp_path):
    init = ["--init", str(TINY_MODEL), "--start", "0.1"]
    main(["--out", str(tmp_path), "--steps", "1", *init, *SMALL_RUN])
    (row,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert row["loss"] < 0.05
    assert all(accuracy is None or accuracy > 0.95 for accuracy in row["token_accuracy"].values())


def test_the_fast_forward_pass_agrees_with_the_unpatched_model(tiny):
    assert check_against_reference(tiny[0], "cpu") < 1e-3


def test_segments_do_not_see_one_another(tiny, batch):
    forward = FastForward(tiny[0], torch.float32, compiled=False)
    pixels = paint(batch)
    with torch.no_grad():
        before, _ = forward(pixels, batch["inputs"], batch["offsets"], batch["segments"])
        changed = torch.where(batch["segments"] == 0, batch["inputs"] % 50 + 60, batch["inputs"])
        after, _ = forward(pixels, changed, batch["offsets"], batch["segments"])
    others = batch["segments"] > 0
    assert torch.allclose(before[others], after[others], atol=1e-4)
    assert not torch.allclose(before[batch["segments"] == 0], after[batch["segments"] == 0], atol=1)


def test_patches_are_those_of_the_processor():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 168, 3), dtype=np.uint8))
    processed = AutoProcessor.from_pretrained(TINY_MODEL).image_processor(image, return_tensors="pt")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    assert torch.allclose(two_frames(patchify(pixels)), processed["pixel_values"], atol=1e-5)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5])
def test_every_stage_gives_batches_of_one_size(progress):
    made = make_batch(random.Random(1), progress, shrink=60)
    sizes, _, images, length = stages(progress)
    count, height, width = made["cover"].shape
    assert count == max(images // 60, 2)
    assert (height, width) in sizes
    assert length <= made["inputs"].shape[1] < length + 8
    prefix = len(PREFIX_HEAD) + height * width // 28**2 + 1
    assert (prefix + made["inputs"].shape[1]) % 8 == 0
    assert made["characters"].shape[:2] == (count, height * width // PATCH**2)


def test_targets_are_the_answers_to_the_questions(batch):
    for inputs, targets, offsets, segments in zip(
        *(batch[name] for name in ("inputs", "targets", "offsets", "segments")), strict=True
    ):
        assert (targets[segments < 0] == IGNORE).all()
        for number in range(int(segments.max()) + 1):
            here = segments == number
            told = inputs[here].tolist()
            assert offsets[here].tolist() == list(range(len(told)))
            start = bytes_index(told, ANSWER_START) + len(ANSWER_START)
            assert targets[here].tolist() == [IGNORE] * (start - 1) + told[start:] + [END]


def bytes_index(tokens, part):
    return next(at for at in range(len(tokens)) if tuple(tokens[at : at + len(part)]) == part)


def test_a_segment_that_does_not_fit_is_left_out():
    packed = pack_segments(random.Random(0), sample_page("document_1.png"), length=20)
    assert (packed["segments"] == -1).all()
    assert (packed["targets"] == IGNORE).all()


def test_character_targets_spell_the_page():
    page = sample_page("document_2.png")
    grid = character_targets(page)
    assert grid.shape == (448 * 560 // PATCH**2, 3)
    # From the processor's order (blocks of 2 by 2 patches) back to rows of patches.
    rows, columns = page.height // PATCH // MERGE, page.width // PATCH // MERGE
    in_rows = grid.reshape(rows, columns, MERGE, MERGE, 3).swapaxes(1, 2).reshape(rows * MERGE, -1)
    spelled = ["".join(map(chr, row[row > 0])) for row in in_rows]
    assert [text for text in spelled if text] == [line.text.replace(" ", "") for line in page.lines]


def test_the_learning_rate_warms_up_and_then_falls():
    args = parse(["--out", "unused", "--lr", "1", "--lr-end", "0.25", "--warmup", "10"])
    assert learning_rate(args, step=1, share=0.0) == pytest.approx(0.1)
    assert learning_rate(args, step=10, share=0.0) == pytest.approx(1.0)
    assert learning_rate(args, step=99, share=0.5) == pytest.approx(0.625)
    assert learning_rate(args, step=99, share=1.0) == pytest.approx(0.25)


def test_the_schedule_grants_one_step_and_then_ends_with_its_time():
    over = Schedule(seconds=0.0)
    assert over.share(step=1) == 0.0
    assert over.share(step=2) is None
    endless = Schedule(seconds=1e9)
    assert endless.share(step=1) == 0.0
    assert 0.0 <= endless.share(step=2) <= endless.share(step=3) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "nowhere"], "no such folder: 'nowhere'"),
        (["--steps", "0"], "--steps: needs a whole number, at least 1, got '0'"),
        (["--shrink", "-1"], "--shrink: needs a whole number, at least 1, got '-1'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
