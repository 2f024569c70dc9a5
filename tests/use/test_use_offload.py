"""Conversations and documents with models whose weights accelerate brings in only while a module runs."""

import copy

import pytest
from accelerate import cpu_offload, dispatch_model

import models
from mmshiftkv import Conversation, Document
from tiny_llava import document_image

PAGE, SMALL = document_image(224, 168), document_image(112, 112)
TURNS = [("What is the Total?", [PAGE]), ("And the date?", []), ("What changed?", [SMALL])]
SETTINGS = {"budget": 24, "max_new_tokens": 8}


def offloaded(case, way, folder):
    model = copy.deepcopy(case.model)
    if way == "memory":  # all of it: the model's own device is then "meta"
        return models.VisionCase(cpu_offload(model, execution_device="cpu"), case.processor)
    parts = models.device_map(model, lambda index: "disk" if index else "cpu", "cpu")
    split = dispatch_model(model, parts, main_device="cpu", offload_dir=folder / "weights")
    return models.VisionCase(split, case.processor)


# With all of LLaVA-NeXT in memory transformers itself does not find its `image_newline`, with any cache.
@pytest.mark.parametrize(("family", "way"), [("qwen2_5_vl", "memory"), ("qwen2_5_vl", "disk"), ("vicuna", "disk")])
def test_turns_and_answers_are_those_of_the_model_without(family, way, vision_case, tmp_path):
    case = vision_case(family)
    away = offloaded(case, way, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in away.model.parameters())
    chats = [Conversation(one.model, one.processor, **SETTINGS) for one in (case, away)]
    for question, images in TURNS:
        expected, found = (chat.ask(question, images=images) for chat in chats)
        assert found == expected
    assert chats[1]._transcript.ids.equal(chats[0]._transcript.ids)
    assert "".join(chats[1].fork().ask("Why?", stream=True)).strip() == chats[0].fork().ask("Why?")
    pages = [Document(one.model, one.processor, PAGE, **SETTINGS) for one in (case, away)]
    questions = [question for question, _ in TURNS]
    expected = pages[0].ask(questions)
    assert pages[1].ask(questions) == expected
    pages[1].save(tmp_path / "page")
    for one in (case, away):
        assert Document.load(tmp_path / "page", one.model, one.processor).ask(questions) == expected
    with pytest.raises(ValueError, match="decode_ahead=True: this model's decoding cannot be compiled"):
        Conversation(away.model, away.processor, decode_ahead=True, **SETTINGS)
