import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, LlavaNextForConditionalGeneration

from benchmarks.quality.peers.given_scores import GivenScores
from common import ASSETS, TINY_LLAVA, sample_documents
from mmshiftkv import PrefillSelectionCache
from tiny_vlm import llava_build
from tiny_vlm.answering import MAX_NEW_TOKENS, answer, build_inputs, load
from tiny_vlm.document_questions import held_out_of_task

DOCUMENTS = sample_documents(str(TINY_LLAVA))


@pytest.fixture(scope="module")
def llava():
    """The second embedded model in float32, and its processor."""
    return load(TINY_LLAVA)


def ask(llava, images, questions, limit):
    model, processor = llava
    inputs = build_inputs(processor, images, questions)
    return answer(model, processor, inputs, DynamicCache(config=model.config.get_text_config()), limit)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_sample_documents_are_read_without_a_mistake(llava, name):
    asked = DOCUMENTS[name][-4:]
    with Image.open(ASSETS / name) as image:
        found = ask(llava, [image] * len(asked), [one["question"] for one in asked], 200)
    assert found == [one["answer"] for one in asked]


def test_held_out_fields_on_pages_of_all_sizes_are_read_without_a_mistake(llava):
    examples = [*held_out_of_task("lookup", 4), *held_out_of_task("multi", 1)]
    found = ask(llava, [one.image for one in examples], [one.question for one in examples], MAX_NEW_TOKENS["multi"])
    assert found == [one.answer for one in examples]


def test_without_visual_tokens_in_the_cache_nothing_is_read(llava):
    model, processor = llava
    for example in held_out_of_task("lookup", 3):
        inputs = build_inputs(processor, [example.image], [example.question])
        text = inputs["input_ids"] != model.config.image_token_id
        config = model.config.get_text_config()
        scores = text.float()[:, None].expand(-1, config.num_key_value_heads, -1).contiguous()
        method = GivenScores([scores] * config.num_hidden_layers)
        cache = PrefillSelectionCache(model, method, int(text.sum()))
        assert answer(model, processor, inputs, cache, MAX_NEW_TOKENS["lookup"]) != [example.answer]
        kept = cache.kept_indices(0)
        assert torch.equal(kept[0, 0], text[0].nonzero().flatten())


def test_the_checkpoint_is_a_plain_llava_next_in_bfloat16():
    model = LlavaNextForConditionalGeneration.from_pretrained(TINY_LLAVA, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_112_064
    processor = AutoProcessor.from_pretrained(TINY_LLAVA)
    assert processor.tokenizer("aé")["input_ids"] == [257, 97, 0xC3, 0xA9]
    assert sum(path.stat().st_size for path in TINY_LLAVA.iterdir()) < 25_000_000


def test_the_files_next_to_the_weights_are_those_that_the_build_script_writes(tmp_path):
    llava_build.write_processor(tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert len(written) == 4
    for name in written:
        assert (tmp_path / name).read_text() == (TINY_LLAVA / name).read_text(), name
    stored = LlavaNextForConditionalGeneration.config_class.from_pretrained(TINY_LLAVA)
    built = llava_build.build_config()
    assert stored.text_config.to_diff_dict() == built.text_config.to_diff_dict()
    assert np.all(stored.image_grid_pinpoints == built.image_grid_pinpoints)
