"""Conversations go on as they would alone, in turn with others on the same model, forked, in batches and streamed."""

import copy
import threading

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import models
from compiling import compiling
from masked_reference import dropped_entries_masked
from mmshiftkv import CACHE_ARGUMENT, Conversation
from tiny_llava import document_image

FAMILIES = ["qwen2_5_vl", "vicuna"]
CASES = [("qwen2_5_vl", False), ("qwen2_5_vl", True), ("vicuna", True)]
PAGE, OTHER, SMALL = document_image(224, 168), document_image(140, 280), document_image(112, 112)
# Three turns, with an image in the last one as well.
FIRST = [("What is the Total?", [PAGE]), ("And the date?", []), ("What changed?", [SMALL])]
SECOND = [("Read line 1.", [OTHER, SMALL]), ("Who signed?", []), ("And here?", [PAGE])]


def conversation(case, budget=24, **settings):
    return Conversation(case.model, case.processor, budget=budget, **{"max_new_tokens": 8, **settings})


def say(chat, turns):
    return [chat.ask(question, images=images) for question, images in turns]


def ids_of(chat):
    return chat._transcript.ids


@pytest.mark.parametrize(("family", "ahead"), CASES)
class TestOnOneModel:
    def test_conversations_in_turn_say_what_each_says_alone(self, vision_case, family, ahead):
        case = vision_case(family)
        alone = [conversation(case, decode_ahead=ahead) for _ in range(2)]
        expected = [say(chat, turns) for chat, turns in zip(alone, (FIRST, SECOND), strict=True)]
        chats, found = [conversation(case, decode_ahead=ahead) for _ in range(2)], [[], []]
        for turns in zip(FIRST, SECOND, strict=True):
            for chat, answers, (question, images) in zip(chats, found, turns, strict=True):
                answers.append(chat.ask(question, images=images))
        assert found == expected
        assert all(ids_of(mine).equal(ids_of(other)) for mine, other in zip(chats, alone, strict=True))

    def test_forks_go_their_own_way(self, vision_case, family, ahead):
        case = vision_case(family)
        chat = conversation(case, decode_ahead=ahead)
        chat.ask(*FIRST[0][:1], images=FIRST[0][1])
        twin = chat.fork()
        other = conversation(case, decode_ahead=ahead)
        expected = say(other, [FIRST[0], SECOND[1], SECOND[2]])
        for (question, images), (another, more) in zip(FIRST[1:], SECOND[1:], strict=True):
            chat.ask(question, images=images)
            assert twin.ask(another, images=more) == expected[len(twin.messages) // 2 - 1]
        alone = conversation(case, decode_ahead=ahead)
        say(alone, FIRST)
        assert ids_of(chat).equal(ids_of(alone))
        assert ids_of(twin).equal(ids_of(other))
        assert len(chat.messages) == len(twin.messages) == 6


class Asked(LogitsProcessor):
    """Knows the ids that an answer begins behind."""

    ids = None

    def __call__(self, input_ids, scores):
        self.ids = input_ids if self.ids is None else self.ids
        return scores


def ask_and_look(chat, question, images):
    """The ids that `generate` was given, and those with the answer."""
    asked = Asked()
    chat.ask(question, images=images, logits_processor=LogitsProcessorList([asked]))
    return asked.ids, ids_of(chat)


def media_of(case, images, ids):
    marks = "".join(case.processor.image_token for _ in images)
    made = case.processor(text=[marks], images=images, return_tensors="pt")
    media = {name: part for name, part in made.items() if name in ("pixel_values", "image_grid_thw", "image_sizes")}
    if "mm_token_type_ids" in made:
        media["mm_token_type_ids"] = (ids == case.processor.image_token_id).long()
    return media


@pytest.mark.parametrize("turns", [FIRST, SECOND])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_with_a_full_budget_all_is_as_a_dynamic_cache_fed_the_whole_conversation(vision_case, family, turns):
    case = vision_case(family)
    chat, shown = conversation(case, budget=1.0), []
    for question, images in turns:
        prompt, ids = ask_and_look(chat, question, images)
        shown += images
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **media_of(case, shown, prompt)}
        cache = DynamicCache(config=case.model.config)
        output = case.model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=8, do_sample=False)
        assert output[:, : ids.shape[1]].equal(ids)


def test_the_ids_are_those_of_the_messages(vision_case):
    case = vision_case("qwen2_5_vl")
    chat = conversation(case, system="You read invoices.", max_new_tokens=5)
    for question, images in FIRST:
        prompt, _ = ask_and_look(chat, question, images)
        whole = case.processor.apply_chat_template(
            chat.messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert whole["input_ids"].equal(prompt)


@pytest.mark.parametrize(("family", "ahead"), CASES)
def test_later_images_are_stored_whole_behind_a_compressed_turn(vision_case, family, ahead):
    """The answer to them is that of a full cache whose dropped entries are masked out."""
    case = vision_case(family)
    model = case.model
    chat = conversation(case, decode_ahead=ahead)
    first, _ = ask_and_look(chat, *FIRST[0])
    prompt, ids = ask_and_look(chat, *FIRST[2])
    kept = {layer: chat._transcript.cache.kept_indices(layer) for layer in range(len(chat._transcript.cache))}
    assert kept[0].shape[-1] == 24
    assert chat.report().tokens_stored == chat.report().tokens_seen - first.shape[1] + 24

    cache, rest = DynamicCache(config=model.config), ids[:, first.shape[1] :]
    inputs = media_of(case, FIRST[0][1], first)
    positions = None
    if hasattr(model.model, "get_rope_index"):
        images = media_of(case, [*FIRST[0][1], *FIRST[2][1]], ids)
        images.pop("pixel_values")
        positions = model.model.get_rope_index(input_ids=ids, attention_mask=torch.ones_like(ids), **images)[0]
    with torch.no_grad():
        width = first.shape[1]
        own = {} if positions is None else {"position_ids": positions[..., :width]}
        model(first, **inputs, **own, **{CACHE_ARGUMENT: cache}, use_cache=True)
        own = {} if positions is None else {"position_ids": positions[..., width:]}
        with dropped_entries_masked(model, kept, torch.ones_like(first).bool()):
            media = media_of(case, FIRST[2][1], rest)
            logits = model(rest, **media, **own, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
    answer = ids[0, prompt.shape[1] :]
    assert len(answer) > 2
    assert logits[0, prompt.shape[1] - width - 1 : -1].argmax(-1).equal(answer)


@pytest.mark.parametrize(("family", "ahead"), CASES)
def test_a_batch_says_what_each_says_alone(vision_case, family, ahead):
    case = vision_case(family)
    expected = [say(conversation(case), turns) for turns in (FIRST, SECOND)]
    chat = conversation(case, decode_ahead=ahead)
    for turn, asked in enumerate(zip(FIRST, SECOND, strict=True)):
        questions, images = zip(*asked, strict=True)
        answers = chat.ask(questions, images=images)
        assert answers == [rows[turn] for rows in expected]
    assert [len(row) for row in chat.messages] == [6, 6]


@pytest.mark.parametrize("ahead", [False, True])
class TestStreaming:
    def test_the_pieces_are_the_answer(self, vision_case, ahead):
        case = vision_case("qwen2_5_vl")
        whole, streamed = conversation(case, decode_ahead=ahead), conversation(case, decode_ahead=ahead)
        for question, images in FIRST:
            pieces = list(streamed.ask(question, images=images, stream=True))
            assert "".join(pieces).strip() == whole.ask(question, images=images)
            assert len(pieces) > 1
        assert ids_of(streamed).equal(ids_of(whole))

    def test_it_can_be_ended_early_and_goes_on(self, vision_case, ahead):
        case = vision_case("qwen2_5_vl")
        chat = conversation(case, max_new_tokens=200, min_new_tokens=200, decode_ahead=ahead)
        stream = chat.ask(*FIRST[0][:1], images=FIRST[0][1], stream=True)
        piece = next(stream)
        stream.close()
        answer = chat.messages[-1]["content"][-1]["text"]
        assert answer.startswith(piece)
        assert ids_of(chat).shape[1] < 150 + 200
        assert chat.ask("And?", max_new_tokens=3, min_new_tokens=3)

    def test_an_error_comes_out_of_the_stream(self, vision_case, ahead):
        chat = conversation(vision_case("qwen2_5_vl"), decode_ahead=ahead)
        with pytest.raises(RuntimeError, match="enough"):
            list(chat.ask("Read line 1.", images=PAGE, stream=True, logits_processor=[Fails(3)]))
        assert chat.messages == []


class Fails(LogitsProcessor):
    def __init__(self, step):
        self.step = step

    def __call__(self, input_ids, scores):
        self.step -= 1
        if self.step == 0:
            raise RuntimeError("enough")
        return scores


class Waits(LogitsProcessor):
    """Lets a turn go on when it is told to."""

    def __init__(self):
        self.may_go_on = threading.Event()

    def __call__(self, input_ids, scores):
        self.may_go_on.wait(60)
        return scores


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(("family", "ahead"), CASES)
def test_a_turn_that_fails_leaves_the_conversation_as_it_was(vision_case, family, ahead, step):
    case = vision_case(family)
    chat, other = conversation(case, decode_ahead=ahead), conversation(case, decode_ahead=ahead)
    for question, images in FIRST:
        with pytest.raises(RuntimeError, match="enough"):
            chat.ask("Something else?", images=[OTHER], logits_processor=[Fails(step)])
        assert chat.ask(question, images=images) == other.ask(question, images=images)
    assert ids_of(chat).equal(ids_of(other))
    assert chat.report().tokens_stored == other.report().tokens_stored


def test_nothing_else_goes_on_while_a_turn_is_running(vision_case):
    chat, waits = conversation(vision_case("qwen2_5_vl")), Waits()
    stream = chat.ask("Read line 1.", images=PAGE, stream=True, logits_processor=[waits])
    for what in (chat.fork, chat.reset, lambda: chat.ask("And?")):
        with pytest.raises(RuntimeError, match="a turn of this conversation is running"):
            what()
    waits.may_go_on.set()
    "".join(stream)
    assert len(chat.fork().messages) == 2


def test_sampling_is_that_of_generate(vision_case):
    case = vision_case("qwen2_5_vl")
    chats = [conversation(case, decode_ahead=ahead, do_sample=True, temperature=0.9) for ahead in (False, True)]
    for question, images in FIRST:
        answers = []
        for chat in chats:
            torch.manual_seed(7)
            answers.append(chat.ask(question, images=images))
        assert answers[0] == answers[1]
    assert chats[0].messages != conversation(case).messages


@pytest.mark.parametrize("ahead", [False, True])
def test_an_answer_ends_behind_a_stop_string(vision_case, ahead):
    case = vision_case("qwen2_5_vl")
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "decode_ahead": ahead}
    whole = conversation(case, **settings).ask("Read the page.", images=PAGE)
    stop = whole[3:5]
    expected = whole[: whole.index(stop) + 2]
    alone, batch = (conversation(case, stop=stop, **settings) for _ in range(2))
    assert alone.ask("Read the page.", images=PAGE) == expected
    assert batch.ask(["Read the page.", "What is the Total?"], images=[PAGE, PAGE])[0] == expected
    assert batch.ask(["And?", "And?"], stop=())[0] == alone.ask("And?", stop=())


def test_a_video(vision_case):
    case = vision_case("qwen2_5_vl")
    chat = conversation(case)
    frames = [PAGE, PAGE.rotate(90, expand=False), PAGE, PAGE]
    answers = [chat.ask("What moves?", videos=[frames]), chat.ask("And here?", videos=[frames[:2]], images=[SMALL])]
    again = conversation(case)
    assert answers == [
        again.ask("What moves?", videos=[frames]),
        again.ask("And here?", videos=[frames[:2]], images=[SMALL]),
    ]
    assert (ids_of(chat) == case.model.config.video_token_id).sum() > 32


TEXT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]"


def text_case(vision_case, model_type="llama", **changes):
    """A text model, and a tokenizer with a chat template."""
    tokenizer = copy.deepcopy(vision_case("vicuna").processor.tokenizer)
    tokenizer.chat_template = TEXT_TEMPLATE
    return models.text_model(model_type, vocab_size=len(tokenizer), **changes), tokenizer


def test_a_text_model_with_its_tokenizer(vision_case):
    model, tokenizer = text_case(vision_case)
    chat = Conversation(model, tokenizer, budget=8, max_new_tokens=4, system="Be kind.")
    assert chat.messages == [{"role": "system", "content": "Be kind."}]
    chat.ask("What is the total?")
    chat.ask("And the date?")
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 2]
    with pytest.raises(ValueError, match=r"images: .* takes no images"):
        chat.ask("And this?", images=PAGE)


def test_templates_that_leave_something_out(vision_case):
    model, tokenizer = text_case(vision_case)
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves a system message out"):
        Conversation(model, tokenizer, budget=8, system="Be kind.")
    chat = Conversation(model, tokenizer, budget=8, max_new_tokens=4)
    chat.ask("What is the total?")
    with pytest.raises(ValueError, match="leaves out what the assistant has answered"):
        chat.ask("And the date?")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Conversation(model, tokenizer, budget=8)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen2", "lfm2", "qwen3_5_text"])
def test_layers_that_are_not_compressed_go_back_too(vision_case, model_type):
    model, tokenizer = text_case(vision_case, model_type, **models.HYBRIDS[model_type])
    chats = [Conversation(model, tokenizer, budget=8, max_new_tokens=6) for _ in range(2)]
    for question in ("What is the total of all that was sold in May?", "And the date?", "Who signed?"):
        with pytest.raises(RuntimeError, match="enough"):
            chats[0].ask("Something else?", logits_processor=[Fails(3)])
        twin = chats[0].fork()
        assert chats[0].ask(question) == chats[1].ask(question)
        assert ids_of(chats[0]).equal(ids_of(chats[1]))
        twin.ask("Something else?")


def test_one_compilation_serves_all_turns_and_conversations(vision_case):
    torch._dynamo.reset()
    counters.clear()
    model, tokenizer = text_case(vision_case)
    settings = {"budget": 8, "max_new_tokens": 30, "decode_ahead": True, "compile_config": compiling()}
    compiled = [Conversation(model, tokenizer, **settings) for _ in range(2)]
    plain = [Conversation(model, tokenizer, budget=8) for _ in range(2)]
    for question in ("What?", "Who is it?"):
        for mine, theirs in zip(compiled, plain, strict=True):
            answer = "".join(mine.ask(question, stream=True, max_new_tokens=8))
            assert answer.strip() == theirs.ask(question, max_new_tokens=8)
    assert counters["stats"]["unique_graphs"] == 1


def test_reset_begins_anew(vision_case):
    case = vision_case("qwen2_5_vl")
    chat = conversation(case)
    expected = say(chat, FIRST)
    chat.reset()
    assert chat.messages == []
    assert say(chat, FIRST) == expected
    assert chat.report().tokens_stored < chat.report().tokens_seen
