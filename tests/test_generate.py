"""What transformers' generate can do, with a compressed cache."""

import copy

import pytest
import torch
from transformers import DynamicCache, TextStreamer

import models
from mmshiftkv import ShiftKVCache

NEW_TOKENS = 10
FAMILIES = ("qwen2_5_vl", "vicuna", "mistral")
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sequences": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
}


def generate(model, inputs, cache, **options):
    torch.manual_seed(3)
    return model.generate(
        **inputs,
        past_key_values=cache,
        **{
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "return_dict_in_generate": True,
            "output_scores": True,
            **options,
        },
    )


# Looked-up candidates may hold image tokens, which LLaVA-NeXT then misses the image for, with every cache.
@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, mode) for family in FAMILIES for mode in MODES if family == "qwen2_5_vl" or mode != "prompt lookup"],
)
def test_a_covering_budget_gives_the_tokens_of_a_dynamic_cache(vision_case, family, mode):
    case = vision_case(family)
    inputs = case.prompts(1 if mode == "prompt lookup" else 2)
    expected = generate(case.model, inputs, DynamicCache(config=case.model.config), **MODES[mode])
    cache = ShiftKVCache(case.model, budget=1.0)
    found = generate(case.model, inputs, cache, **MODES[mode])
    assert found.sequences.equal(expected.sequences)
    assert all(mine.equal(theirs) for mine, theirs in zip(found.scores, expected.scores, strict=True))
    assert found.past_key_values is cache


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reserved", [None, NEW_TOKENS])
def test_a_small_budget_stores_the_budget_and_the_new_tokens(vision_case, mode, reserved):
    case = vision_case("qwen2_5_vl")
    inputs = case.prompts(1 if mode == "prompt lookup" else 2)
    cache = ShiftKVCache(case.model, budget=12, max_new_tokens=reserved)
    found = generate(case.model, inputs, cache, **MODES[mode])
    again = generate(case.model, inputs, ShiftKVCache(case.model, budget=12), **MODES[mode])
    assert found.sequences.equal(again.sequences)
    seen = inputs["input_ids"].shape[1] + NEW_TOKENS - 1
    report = cache.report()
    assert cache.get_seq_length() == report.tokens_seen == seen
    if mode != "prompt lookup":
        assert report.tokens_stored == 12 + NEW_TOKENS - 1
    assert models.hooks_on(case.model) == 0


def test_beams_carry_their_kept_tokens_along():
    """Beams of different prompts never mix: each row's selection is that of its prompt whatever beams were chosen."""
    model, inputs = models.text_model(), {"input_ids": models.prompt_ids(2, 30)}
    cache, single = ShiftKVCache(model, budget=7), ShiftKVCache(model, budget=7)
    found = generate(model, inputs, cache, num_beams=4, do_sample=False)
    with torch.no_grad():
        model(**inputs, past_key_values=single, use_cache=True)
    assert found.beam_indices.unique().numel() > 2
    for layer in range(3):
        rows = cache.kept_indices(layer)
        assert rows.shape == (8, 2, 7)
        assert rows.equal(single.kept_indices(layer).repeat_interleave(4, dim=0))


def test_beam_search_scores_are_those_of_the_sequences_it_returns():
    """A beam's log-probability adds up from its own tokens only if its cache rows moved along with it."""
    model, inputs = models.text_model(), {"input_ids": models.prompt_ids(1, 30)}
    found = generate(model, inputs, ShiftKVCache(model, budget=7), num_beams=4, do_sample=False, length_penalty=0.0)
    cache = ShiftKVCache(model, budget=7)
    total, step = 0.0, inputs["input_ids"]
    for token in found.sequences[0, 30:]:
        with torch.no_grad():
            logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        step = token.view(1, 1)
    assert found.sequences_scores[0].item() == pytest.approx(total, abs=0.05)


def test_streaming_gives_the_same_text(vision_case, capsys):
    case = vision_case("qwen2_5_vl")
    inputs = case.prompts()
    found = generate(case.model, inputs, ShiftKVCache(case.model, budget=40), do_sample=False, min_new_tokens=None)
    capsys.readouterr()
    streamer = TextStreamer(case.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate(
        case.model, inputs, ShiftKVCache(case.model, budget=40), do_sample=False, min_new_tokens=None, streamer=streamer
    )
    text = case.processor.decode(found.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.strip()


class TestLaterTurns:
    """A second turn appends its tokens whole; the first turn's selection stays."""

    def run(self, model, cache, turns):
        logits = []
        for turn in turns:
            with torch.no_grad():
                logits.append(model(turn, past_key_values=cache, use_cache=True).logits)
        return logits

    def test_the_new_turn_is_stored_whole_and_the_prompt_stays_compressed(self):
        model = models.text_model()
        cache = ShiftKVCache(model, budget=8)
        found = generate(model, {"input_ids": models.prompt_ids(1, 40)}, cache)
        kept = cache.kept_indices(1)
        conversation = torch.cat([found.sequences, models.prompt_ids(1, 15, seed=4)], dim=1)
        answer = generate(model, {"input_ids": conversation}, cache)
        assert answer.sequences.shape[1] == 40 + NEW_TOKENS + 15 + NEW_TOKENS
        assert cache.get_seq_length() == answer.sequences.shape[1] - 1
        assert cache.report().tokens_stored == 8 + cache.get_seq_length() - 40
        assert cache.kept_indices(1).equal(kept)

    def test_turns_at_once_and_token_by_token_agree(self):
        model = models.text_model()
        prompt, turn = models.prompt_ids(1, 40), models.prompt_ids(1, 12, seed=4)
        whole = self.run(model, ShiftKVCache(model, budget=8), [prompt, turn])[1]
        single = self.run(model, ShiftKVCache(model, budget=8), [prompt, *turn.split(1, dim=1)])[1:]
        torch.testing.assert_close(whole, torch.cat(single, dim=1), atol=1e-4, rtol=1e-4)

    def test_one_image_and_several_questions(self, vision_case):
        """Deep copies of one compressed prompt answer as fresh caches do, and leave it unchanged."""
        case = vision_case("qwen2_5_vl")
        inputs = case.prompts()
        shared = ShiftKVCache(case.model, budget=24)
        with torch.no_grad():
            case.model(**inputs, past_key_values=shared, use_cache=True)
        states = [tuple(part.clone() for part in (layer.keys, layer.values)) for layer in shared.layers]
        questions = [models.prompt_ids(1, length, seed=length) for length in (3, 9)]
        for question in questions:
            fresh = ShiftKVCache(case.model, budget=24)
            with torch.no_grad():
                case.model(**inputs, past_key_values=fresh, use_cache=True)
            expected = self.run(case.model, fresh, [question, question])
            twin = copy.deepcopy(shared)
            found = self.run(case.model, twin, [question, question])
            assert all(mine.equal(theirs) for mine, theirs in zip(found, expected, strict=True))
        assert shared.get_seq_length() == inputs["input_ids"].shape[1]
        for layer, (keys, values) in zip(shared.layers, states, strict=True):
            assert layer.keys.equal(keys)
            assert layer.values.equal(values)


class TestAssistedDecoding:
    """The first pass holds the prompt and the first candidates: the prompt alone is selected from."""

    def inputs(self):
        # A text that repeats itself, so that looking up the prompt finds candidates from the first step on.
        return {"input_ids": models.prompt_ids(1, 10).repeat(1, 5)}

    @pytest.mark.parametrize("candidates", [1, 6, 300])
    def test_the_prompt_alone_is_selected_from(self, candidates):
        model, inputs = models.text_model(), self.inputs()
        cache, expected = ShiftKVCache(model, budget=12), ShiftKVCache(model, budget=12)
        found = generate(model, inputs, cache, do_sample=False, prompt_lookup_num_tokens=candidates)
        greedy = generate(model, inputs, expected, do_sample=False)
        assert found.sequences.equal(greedy.sequences)
        for layer in range(3):
            assert cache.kept_indices(layer).equal(expected.kept_indices(layer))
        assert cache.get_seq_length() == expected.get_seq_length()

    @pytest.mark.parametrize("budget", [49, 50, 51, 58])
    @pytest.mark.parametrize("settings", [{}, {"max_new_tokens": 12}])
    def test_a_prompt_that_fits_is_kept_whole(self, budget, settings):
        model, inputs = models.text_model(), self.inputs()
        cache = ShiftKVCache(model, budget=budget, **settings)
        found = generate(model, inputs, cache, do_sample=False, prompt_lookup_num_tokens=6)
        assert cache.layers[0].dropped == max(50 - budget, 0)
        if budget >= 50:
            full = generate(model, inputs, DynamicCache(config=model.config), do_sample=False)
            assert found.sequences.equal(full.sequences)

    def test_another_loop_is_refused(self):
        model = models.text_model()
        cache = ShiftKVCache(model, budget=12)
        cache.activate_past_recording()
        with pytest.raises(ValueError, match="assisted decoding by another loop"), torch.no_grad():
            model(models.prompt_ids(1, 50), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 0

    def test_a_later_turn_is_refused_since_it_would_be_fed_twice(self):
        model = models.text_model()
        for make in (lambda: ShiftKVCache(model, budget=12), lambda: ShiftKVCache(model, budget=12, max_new_tokens=40)):
            cache = make()
            output = generate(model, self.inputs(), cache, do_sample=False, prompt_lookup_num_tokens=6)
            seen = int(cache.get_seq_length())
            turn = {"input_ids": torch.cat([output.sequences, models.prompt_ids(1, 4)], dim=1)}
            with pytest.raises(ValueError, match="feeds the whole conversation again"):
                generate(model, turn, cache, do_sample=False, prompt_lookup_num_tokens=6)
            assert int(cache.get_seq_length()) == seen
            generate(model, turn, cache, do_sample=False)
            assert int(cache.get_seq_length()) > seen

    def test_recording_ends_with_reset(self):
        model = models.text_model()
        cache = ShiftKVCache(model, budget=12)
        generate(model, self.inputs(), cache, do_sample=False, prompt_lookup_num_tokens=6)
        cache.reset()
        with torch.no_grad():
            model(models.prompt_ids(), past_key_values=cache, use_cache=True)
        assert cache.kept_indices(0).shape[-1] == 12

    def test_an_assistant_model(self):
        model, assistant = models.text_model(), models.text_model(seed=0)
        inputs = {"input_ids": models.prompt_ids(1, 30)}
        expected = generate(model, inputs, DynamicCache(config=model.config), do_sample=False)
        found = generate(model, inputs, ShiftKVCache(model, budget=1.0), do_sample=False, assistant_model=assistant)
        assert found.sequences.equal(expected.sequences)
