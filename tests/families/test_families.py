"""Some families, one for each mechanism of attention, do what the record says; the tables of the document are its."""

import json
from importlib.metadata import version

import pytest

from families.configs import Family, all_families
from families.examine import examine
from families.run import RECORD
from families.table import DOCUMENT, block, with_block
from families.worker import Worker

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))
FAMILIES = {family.name: family for family in all_families()}
IS_RECORDED_VERSION = RECORDED["versions"]["transformers"] == version("transformers")

MECHANISMS = {
    "grouped queries": "llama",
    "one projection for queries, keys and values": "phi3",
    "gated queries": "qwen3_next",
    "latent attention": "deepseek_v3",
    "sinks": "gpt_oss",
    "soft-capped logits": "gemma2",
    "layers without rotary embedding": "smollm3",
    "partial rotary embedding": "glm",
    "complex rotary embedding": "llama4_text",
    "sliding windows": "gemma3_text",
    "linear attention": "lfm2",
    "layers that share keys and values": "gemma4_text",
    "positions of several axes, images": "qwen2_5_vl",
    "linear attention, images": "qwen3_5",
    "windows, images": "gemma3",
    "image parts of several sizes": "llava_next",
    "nothing but recurrent layers": "mamba",
    "encoder-decoder": "bart",
}


@pytest.mark.parametrize("name", MECHANISMS.values(), ids=list(MECHANISMS))
def test_a_family_does_what_the_record_says(name):
    if name not in FAMILIES:
        pytest.skip(f"transformers {version('transformers')} has no {name}")
    found, recorded = examine(FAMILIES[name]), RECORDED["families"][name]
    if IS_RECORDED_VERSION:
        assert found == recorded
    else:
        assert found["outcome"] == recorded["outcome"]


@pytest.mark.skipif(not IS_RECORDED_VERSION, reason="the record is of another version of transformers")
def test_the_record_has_every_family():
    assert set(RECORDED["families"]) == set(FAMILIES)


def test_the_tables_in_the_document_are_those_of_the_record():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_block(text, block(RECORDED)) == text


def test_a_family_that_cannot_be_built_is_listed_with_the_reason():
    found = examine(Family("no such type", "LlamaForCausalLM", takes_images=False))
    assert found["outcome"] == "not built"
    assert "no such type" in found["reason"]


def test_a_family_that_hangs_ends_its_process_alone():
    worker = Worker(limit=0)
    found = worker.examine(FAMILIES["llama"])
    worker.close()
    assert found["outcome"] == "faulty"
    assert found["reason"] == "took more than 0 s"
