"""On a GPU: fixed storage, `decode_ahead` and CUDA graphs in the model's thread, streamed or not."""

import pytest

import models
from mmshiftkv import Conversation, Document
from tiny_llava import document_image

pytestmark = [pytest.mark.gpu, models.requires_gpu]
PAGES = [document_image(224, 168), document_image(140, 280), document_image(112, 112)]


@pytest.fixture(scope="module")
def case():
    loaded = models.qwen2_5_vl()
    loaded.model.cuda()
    return loaded


def test_turns_streamed_and_not_are_those_of_growing_storage(case):
    plain = Conversation(case.model, case.processor, budget=24, max_new_tokens=12, decode_ahead=False)
    whole, streamed = (Conversation(case.model, case.processor, budget=24, max_new_tokens=12) for _ in range(2))
    assert whole.cache.is_compileable
    for question, images in (("What is the Total?", PAGES[:1]), ("And the date?", []), ("What changed?", PAGES[2:])):
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
