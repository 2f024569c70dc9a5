"""What conversations refuse, and that they are then as they were."""

import pytest
import torch
from test_conversation import PAGE, SMALL, conversation, ids_of

from mmshiftkv import Conversation


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"question": " \n"}, ValueError, "has no words"),
            ({"question": 5}, TypeError, "question is a int: give a text"),
            ({"question": ["What?"], "images": [[PAGE]]}, ValueError, "question: 1 texts for one conversation"),
            ({"question": "What?", "images": [PAGE, 7]}, TypeError, r"images\[1\] is a int"),
            ({"question": "What?", "images": "nothing.png"}, ValueError, r"images\[0\]='nothing.png' cannot be read"),
            ({"question": "What?", "images": torch.zeros(3, 3)}, ValueError, r"images\[0\] has shape \(3, 3\)"),
            ({"question": "What?", "videos": PAGE}, TypeError, "videos is a Image"),
            ({"question": ["What?"], "images": [[PAGE], []]}, ValueError, "question holds 1 texts, images 2"),
            ({"question": ["What?"], "stream": True}, ValueError, "stream=True is for one conversation"),
            ({"question": ["What?", "Who?"]}, ValueError, "question: 2 texts for one conversation"),
            ({"question": "What?", "num_beams": 2}, ValueError, "num_beams=2: not for conversations"),
            ({"question": "What?", "streamer": None}, ValueError, "streamer is given to generate by"),
            ({"question": "What?", "max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be"),
            ({"question": "What?", "stop": ("a", "")}, ValueError, "stop=.* must be a text or several"),
            ({"question": "What?", "max_new_tokens": 9999}, ValueError, "the turn does not fit"),
        ],
    )
    def test_bad_input_leaves_the_conversation_as_it_was(self, vision_case, given, error, message):
        chat = conversation(vision_case("qwen2_5_vl"))
        chat.ask("What is the Total?", images=PAGE)
        before, ids, report = chat.messages, ids_of(chat), str(chat.report())
        with pytest.raises(error, match=message):
            chat.ask(given.pop("question"), **given)
        assert chat.messages == before
        assert ids_of(chat) is ids
        assert str(chat.report()) == report

    def test_a_turn_that_does_not_fit_says_so_before_it_streams(self, vision_case):
        chat = conversation(vision_case("vicuna"), max_length=400)
        chat.ask("What?", images=SMALL)
        with pytest.raises(ValueError, match="more than max_length=400"):
            chat.ask("And?", max_new_tokens=390, stream=True)
        assert len(chat.messages) == 2

    def test_a_processor_of_another_model(self, vision_case):
        qwen, vicuna = vision_case("qwen2_5_vl"), vision_case("vicuna")
        with pytest.raises(ValueError, match="Qwen2_5_VLProcessor is of another model"):
            Conversation(vicuna.model, qwen.processor, budget=8)
        with pytest.raises(ValueError, match="LlavaNextProcessor is of another model"):
            Conversation(qwen.model, vicuna.processor, budget=8)
        with pytest.raises(TypeError, match="processor is a str"):
            Conversation(qwen.model, "Qwen", budget=8)

    def test_settings(self, vision_case):
        case = vision_case("qwen2_5_vl")
        for settings, message in (
            ({"budget": 0}, "budget=0"),
            ({"method": "none"}, "method='none'"),
            ({"method": "full"}, 'method="full" has no cache'),
            ({"num_return_sequences": 2}, "num_return_sequences=2"),
            ({"max_length": 0}, "max_length=0"),
        ):
            with pytest.raises(ValueError, match=message):
                conversation(case, **settings)
