"""A document answers each question as a fresh one would, in any order and batch, saved and loaded, with others."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

import models
from mmshiftkv import CACHE_ARGUMENT, Document, ShiftKVCache
from mmshiftkv.methods.keydiff import KeyDiff
from mmshiftkv.registry import CACHES, register_method
from tiny_llava import document_image

PAGES = [document_image(224, 168), document_image(140, 280), document_image(112, 112)]
QUESTIONS = ["What is the Total?", "Who signed?", "Read line 1 of the second page, please."]
FAMILIES = ["qwen2_5_vl", "vicuna"]
CASES = [("qwen2_5_vl", False), ("qwen2_5_vl", True), ("vicuna", True)]


def document(case, images=PAGES[0], budget=24, **settings):
    return Document(case.model, case.processor, images, budget=budget, **{"max_new_tokens": 8, **settings})


@pytest.mark.parametrize(("family", "ahead"), CASES)
def test_questions_in_any_order_and_in_one_batch(vision_case, family, ahead):
    case = vision_case(family)
    expected = [document(case).ask(question) for question in QUESTIONS]
    page, other = document(case, decode_ahead=ahead), document(case, PAGES[1])
    report = str(page.report())
    assert page.ask(QUESTIONS) == expected
    other.ask("And here?")  # another one of the same model, with other positions
    assert [page.ask(question) for question in reversed(QUESTIONS)] == expected[::-1]
    assert page.ask([QUESTIONS[2], QUESTIONS[0]]) == [expected[2], expected[0]]
    assert str(page.report()) == report


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_full_budget_it_answers_as_generate_does(vision_case, family):
    case = vision_case(family)
    page = document(case, PAGES[:2], budget=1.0)
    inputs = case.inputs(*((question, PAGES[:2]) for question in QUESTIONS))
    output = case.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    texts = case.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert page.ask(QUESTIONS) == [text.strip() for text in texts]


def test_no_question_has_a_say_in_what_is_kept(vision_case):
    case = vision_case("qwen2_5_vl")
    kept = document(case)._held.cache.kept_indices(0)
    inputs = case.inputs(("", PAGES[0]))
    length = inputs["input_ids"][0].tolist().index(case.model.config.vision_end_token_id) + 1
    of_tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {name: part[:, :length] if name in of_tokens else part for name, part in inputs.items()}
    cache = ShiftKVCache(case.model, budget=24)
    with torch.no_grad():
        case.model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)
    assert kept.equal(cache.kept_indices(0))


@pytest.mark.parametrize(("family", "ahead"), CASES)
def test_many_documents_answer_as_each_alone(vision_case, family, ahead):
    case = vision_case(family)
    pages = [document(case, images, decode_ahead=ahead) for images in (*PAGES, PAGES[:2])]
    expected = [page.ask(question) for page, question in zip(pages, [*QUESTIONS, "And?"], strict=True)]
    assert Document.ask_each(pages, [*QUESTIONS, "And?"]) == expected
    same = Document.ask_each(pages, QUESTIONS[0])
    assert same == [page.ask(QUESTIONS[0]) for page in pages]


def test_sixty_four_documents(vision_case):
    case = vision_case("vicuna")
    pages = [document(case, document_image(56 + 8 * (row % 8), 56 + 4 * row), max_new_tokens=4) for row in range(64)]
    assert len({page._held.width for page in pages}) > 3
    assert Document.ask_each(pages, QUESTIONS[0]) == [page.ask(QUESTIONS[0]) for page in pages]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_one_answers_bit_by_bit_the_same(vision_case, family, tmp_path):
    case = vision_case(family)
    page = document(case, PAGES[:2], cache_settings={"preset": "value-aware"}, stop="\n", do_sample=False)
    page.save(tmp_path / "page.kv")
    document(case, PAGES[2]).ask("And here?")
    loaded = Document.load(tmp_path / "page.kv", case.model, case.processor)
    for mine, theirs in zip(loaded._held.cache.layers, page._held.cache.layers, strict=True):
        assert mine.keys.equal(theirs.keys)
        assert mine.values.equal(theirs.values)
    logits = [one_logits(each) for each in (page, loaded)]
    assert logits[0].equal(logits[1])
    assert loaded.ask(QUESTIONS) == page.ask(QUESTIONS)
    assert loaded._answering == page._answering
    both = Document.ask_each([loaded, page], QUESTIONS[0])
    assert both[0] == both[1] == page.ask(QUESTIONS[0])


class Seen(LogitsProcessor):
    """Keeps what it sees."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


def one_logits(page):
    seen = Seen()
    page.ask(QUESTIONS[0], logits_processor=[seen])
    return torch.stack(seen.scores)


def test_a_text_and_a_system_message(vision_case):
    tokenizer = vision_case("vicuna").processor.tokenizer
    model = LlamaForCausalLM(LlamaConfig(**{**models.SHAPE, "vocab_size": len(tokenizer)})).eval()
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]"
    tokenizer.chat_template = template
    try:
        letter = Document(
            model, tokenizer, text="Dear all,\nit is done.", budget=8, system="Be kind.", max_new_tokens=4
        )
        ids = tokenizer("[system] Be kind. [user] Dear all,\nit is done.\n\n")["input_ids"]
        assert letter._held.ids[0].tolist() == ids
        assert letter.ask(QUESTIONS) == [letter.ask(question) for question in QUESTIONS]
    finally:
        tokenizer.chat_template = None


def test_a_video(vision_case):
    case = vision_case("qwen2_5_vl")
    film = Document(case.model, case.processor, videos=[PAGES[:1] * 4], budget=24, max_new_tokens=4)
    assert film.report().tokens_stored == 24
    assert film.ask(QUESTIONS) == [film.ask(question) for question in QUESTIONS]


def test_a_model_with_layers_that_cannot_be_joined(vision_case):
    tokenizer = vision_case("vicuna").processor.tokenizer
    model = models.text_model("gemma3_text", vocab_size=len(tokenizer), **models.HYBRIDS["gemma3_text"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    try:
        with pytest.raises(ValueError, match=r"layers \[0, 2\] are no full-attention layers"):
            Document(model, tokenizer, text="Dear all, it is done.", budget=8)
    finally:
        tokenizer.chat_template = None


class TestRefused:
    @pytest.fixture
    def saved(self, vision_case, tmp_path):
        document(vision_case("qwen2_5_vl")).save(tmp_path / "page.kv")
        return tmp_path / "page.kv"

    def test_nothing_to_read(self, vision_case):
        for images in (None, []):
            with pytest.raises(ValueError, match="a document needs at least one image"):
                document(vision_case("qwen2_5_vl"), images)
        with pytest.raises(TypeError, match=r"images\[0\] is a int"):
            document(vision_case("qwen2_5_vl"), 5)

    @pytest.mark.parametrize(
        ("question", "options", "error", "message"),
        [
            ("", {}, ValueError, r"questions\[0\]='' has no words"),
            (["What?", None], {}, TypeError, r"questions\[1\] is a NoneType"),
            ([], {}, ValueError, "0 texts for 0 documents"),
            ("What?", {"num_beams": 3}, ValueError, "num_beams=3"),
            ("What?", {"max_new_tokens": 9999}, ValueError, "does not fit"),
        ],
    )
    def test_questions_that_cannot_be_answered(self, vision_case, question, options, error, message):
        page = document(vision_case("qwen2_5_vl"))
        before = str(page.report())
        with pytest.raises(error, match=message):
            page.ask(question, **options)
        assert str(page.report()) == before

    def test_a_document_that_does_not_fit(self, vision_case):
        with pytest.raises(ValueError, match="are more than max_length=20"):
            document(vision_case("qwen2_5_vl"), max_length=20)

    def test_documents_that_do_not_go_together(self, vision_case):
        case = vision_case("qwen2_5_vl")
        with pytest.raises(ValueError, match="another holds 25"):
            Document.ask_each([document(case), document(case, budget=25)], "What?")
        with pytest.raises(ValueError, match="questions holds 1 texts for 2 documents"):
            Document.ask_each([document(case)] * 2, ["What?"])

    def test_another_model_or_processor(self, vision_case, saved):
        qwen, vicuna = vision_case("qwen2_5_vl"), vision_case("vicuna")
        with pytest.raises(ValueError, match="saved with another model: model_type is 'qwen2_5_vl_text' there"):
            Document.load(saved, vicuna.model, vicuna.processor)
        template = qwen.processor.chat_template
        try:
            qwen.processor.chat_template = template.replace("helpful", "kind")
            with pytest.raises(ValueError, match="saved with another processor"):
                Document.load(saved, qwen.model, qwen.processor)
        finally:
            qwen.processor.chat_template = template

    def test_files_that_hold_something_else(self, vision_case, saved, monkeypatch):
        case = vision_case("qwen2_5_vl")
        document(case)._held.cache.save(saved.parent / "cache.kv")
        with pytest.raises(ValueError, match=r"holds a cache, not a document; use ShiftKVCache\.load"):
            Document.load(saved.parent / "cache.kv", case.model, case.processor)
        content = bytearray(saved.read_bytes())
        content[-7] ^= 1
        saved.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            Document.load(saved, case.model, case.processor)

    def test_a_method_that_is_not_registered(self, vision_case, tmp_path, monkeypatch):
        case = vision_case("qwen2_5_vl")
        monkeypatch.setattr("mmshiftkv.registry.CACHES", dict(CACHES))
        monkeypatch.setitem(CACHES, "mine", register_method("mine", type("Mine", (KeyDiff,), {})))
        document(case, method="mine").save(tmp_path / "page.kv")
        loaded = Document.load(tmp_path / "page.kv", case.model, case.processor)
        assert loaded.ask(QUESTIONS) == document(case, method="mine").ask(QUESTIONS)
        monkeypatch.delitem(CACHES, "mine")
        with pytest.raises(ValueError, match="its method MineCache is not registered"):
            Document.load(tmp_path / "page.kv", case.model, case.processor)

    def test_options_that_cannot_be_written(self, vision_case, tmp_path):
        page = document(vision_case("qwen2_5_vl"), logits_processor=[Seen()])
        with pytest.raises(ValueError, match="options of generate cannot be saved"):
            page.save(tmp_path / "page.kv")
        assert list(tmp_path.iterdir()) == []
