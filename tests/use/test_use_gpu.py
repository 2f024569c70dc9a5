"""On a GPU: fixed storage, `decode_ahead` and CUDA graphs in the model's thread, streamed or not."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

import models
from mmshiftkv import Conversation, Document
from tiny_llava import document_image

pytestmark = [pytest.mark.gpu, models.requires_gpu]
PAGES = [document_image(224, 168), document_image(140, 280), document_image(112, 112)]
TURNS = (("What is the Total?", PAGES[:1]), ("And the date?", []), ("What changed?", PAGES[2:]))


@pytest.fixture(scope="module")
def case():
    loaded = models.qwen2_5_vl()
    loaded.model.cuda()
    return loaded


def test_turns_streamed_and_not_are_those_of_growing_storage(case):
    plain = Conversation(case.model, case.processor, budget=24, max_new_tokens=12, decode_ahead=False)
    whole, streamed = (Conversation(case.model, case.processor, budget=24, max_new_tokens=12) for _ in range(2))
    assert whole.cache.is_compileable
    for question, images in TURNS:
        expected = plain.ask(question, images=images)
        assert whole.ask(question, images=images) == expected
        assert "".join(streamed.ask(question, images=images, stream=True)).strip() == expected


def test_documents_joined_and_alone(case):
    settings = {"budget": 24, "max_new_tokens": 12}
    pages = [Document(case.model, case.processor, page, **settings) for page in PAGES]
    plain = [Document(case.model, case.processor, page, decode_ahead=False, **settings) for page in PAGES]
    expected = [page.ask("Read line 1.") for page in plain]
    assert Document.ask_each(pages, "Read line 1.") == expected
    assert [page.ask("Read line 1.") for page in pages] == expected


def assert_answers_as(case, other):
    """Turns and a document's answers of one model are those of the other."""
    settings = {"budget": 24, "max_new_tokens": 12}
    chats = [Conversation(one.model, one.processor, **settings) for one in (case, other)]
    for question, images in TURNS:
        expected, found = (chat.ask(question, images=images) for chat in chats)
        assert found == expected
    pages = [Document(one.model, one.processor, PAGES[0], **settings) for one in (case, other)]
    expected, found = (page.ask([question for question, _ in TURNS]) for page in pages)
    assert found == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_over_two_devices(case):
    blocks = len(case.model.model.language_model.layers)
    devices = models.device_map(case.model, lambda index: int(index >= blocks // 2), 0)
    split = dispatch_model(copy.deepcopy(case.model), device_map=devices)
    assert_answers_as(case, models.VisionCase(split, case.processor))


def test_weights_in_main_memory(case):
    away = cpu_offload(copy.deepcopy(case.model).cpu(), execution_device=0)
    assert away.device.type == "meta"
    assert_answers_as(case, models.VisionCase(away, case.processor))
