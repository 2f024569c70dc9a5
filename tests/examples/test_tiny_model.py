import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, Qwen2_5_VLForConditionalGeneration

from common import TINY_MODEL
from tiny_vlm import build
from tiny_vlm.answering import MAX_NEW_TOKENS, answer, build_inputs
from tiny_vlm.pages import held_out_of_task

ASSETS = TINY_MODEL.parent
DOCUMENTS = json.loads((ASSETS / "documents.json").read_text(encoding="utf-8"))


def ask(tiny, images, questions, limit=MAX_NEW_TOKENS["all"]):
    model, processor = tiny
    inputs = build_inputs(processor, images, questions)
    return answer(model, processor, inputs, DynamicCache(config=model.config), limit)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_sample_documents_are_read_without_a_mistake(tiny, name):
    asked = DOCUMENTS[name]
    with Image.open(ASSETS / name) as image:
        found = ask(tiny, [image] * len(asked), [one["question"] for one in asked])
    assert found == [one["answer"] for one in asked]


@pytest.mark.parametrize("task", ["lookup", "multi"])
def test_held_out_fields_are_read_without_a_mistake(tiny, task):
    examples = list(held_out_of_task(task, 8))
    found = ask(tiny, [one.image for one in examples], [one.question for one in examples], MAX_NEW_TOKENS[task])
    assert found == [one.answer for one in examples]


def test_left_padding_changes_no_answer(tiny):
    examples = list(held_out_of_task("line", 3))
    together = ask(tiny, [one.image for one in examples], [one.question for one in examples])
    assert together == [ask(tiny, [one.image], [one.question])[0] for one in examples]
    lengths = build_inputs(tiny[1], [one.image for one in examples], [one.question for one in examples])
    assert lengths["attention_mask"][:, -1].all()
    assert not lengths["attention_mask"][:, 0].all()


def test_the_answer_comes_from_the_image(tiny):
    question = DOCUMENTS["document_1.png"][0]
    blank = Image.new("RGB", (448, 560), "white")
    assert ask(tiny, [blank], [question["question"]], 24) != [question["answer"]]


def test_the_checkpoint_is_a_plain_qwen2_5_vl_in_bfloat16():
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY_MODEL, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_912_000
    processor = AutoProcessor.from_pretrained(TINY_MODEL)
    assert processor.tokenizer("aé\n")["input_ids"] == [97, 0xC3, 0xA9, 10]


def test_the_files_next_to_the_weights_are_those_that_the_build_script_writes(tmp_path):
    build.write_processor(tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert len(written) == 5
    for name in written:
        assert (tmp_path / name).read_text() == (TINY_MODEL / name).read_text(), name
    stored = Qwen2_5_VLForConditionalGeneration.config_class.from_pretrained(TINY_MODEL)
    built = build.build_config()
    assert stored.text_config.to_diff_dict() == built.text_config.to_diff_dict()
    assert np.all(stored.image_token_id == built.image_token_id)
