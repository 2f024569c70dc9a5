"""A prompt prefilled in several passes is selected from once, as if it had come in one."""

import pytest
import torch
from transformers import DynamicCache

import models
from mmshiftkv import ShiftKVCache


def greedy(model, inputs, cache, **options):
    return model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def assert_same_selection(one, other):
    for layer in range(len(one.layers)):
        assert one.kept_indices(layer).equal(other.kept_indices(layer)), f"layer {layer}"


# With 39 the last chunk is a single token.
@pytest.mark.parametrize("chunk", [1, 7, 15, 39, 40, 64])
@pytest.mark.parametrize("told", [{}, {"prefill": "chunked"}, {"prefill": "chunked", "prompt_length": 40}])
@pytest.mark.parametrize("settings", [{}, {"stats_window": 9}, {"last_token_layers": 1}])
def test_chunks_select_what_a_single_pass_selects(chunk, told, settings):
    model, inputs = models.text_model("qwen2"), models.left_padded([40, 23, 5])
    single = ShiftKVCache(model, budget=9, **settings)
    expected = greedy(model, inputs, single)
    cache = ShiftKVCache(model, budget=9, **told, **settings)
    found = greedy(model, inputs, cache, prefill_chunk_size=chunk)
    assert_same_selection(cache, single)
    assert found.sequences.equal(expected.sequences)
    assert cache.report().tokens_stored == 9 + 7
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-4)
    assert models.hooks_on(model) == 0


def test_chunks_by_hand_end_with_the_length_or_with_a_word():
    model, ids = models.text_model(), models.prompt_ids()
    single = ShiftKVCache(model, budget=9)
    with torch.no_grad():
        model(ids, past_key_values=single, use_cache=True)
        for told in ({}, {"prompt_length": 40}):
            cache = ShiftKVCache(model, budget=9, prefill="chunked", **told)
            for part in ids.split(14, dim=1):
                model(part, past_key_values=cache, use_cache=True)
            cache.end_prompt()
            assert_same_selection(cache, single)
            model(models.prompt_ids(1, 20), past_key_values=cache, use_cache=True)  # a turn, not another chunk
            assert_same_selection(cache, single)
            assert cache.report().tokens_stored == 9 + 20


def test_one_token_after_chunks_of_unknown_length_is_refused():
    model = models.text_model()
    cache = ShiftKVCache(model, budget=9, prefill="chunked")
    with torch.no_grad():
        model(models.prompt_ids(), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match=r"its last chunk or the answer's first token.*end_prompt\(\)"):
            model(models.prompt_ids(1, 1), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 40
        cache.end_prompt()
        model(models.prompt_ids(1, 1), past_key_values=cache, use_cache=True)
    assert cache.kept_indices(0).shape[-1] == 9
    assert cache.get_seq_length() == 41


@pytest.mark.parametrize("family", ["vicuna", "qwen2_5_vl"])
def test_images_in_chunks(vision_case, family):
    case = vision_case(family)
    inputs, plain = case.prompts(2), []
    for options in ({}, {"prefill_chunk_size": 30}):
        try:
            plain.append(greedy(case.model, inputs, DynamicCache(config=case.model.config), **options).logits)
        except (ValueError, RuntimeError) as error:
            pytest.skip(f"this transformers cannot prefill the model in chunks: {error}")
    if not torch.allclose(plain[0][0], plain[1][0], atol=1e-3):
        pytest.skip("this transformers prefills the model's images wrongly in chunks, with its own cache too")
    cache = ShiftKVCache(case.model, budget=1.0, prefill="chunked")
    found = greedy(case.model, inputs, cache, prefill_chunk_size=30)
    assert all(mine.equal(theirs) for mine, theirs in zip(found.logits, plain[1], strict=True))
    cache, single = ShiftKVCache(case.model, budget=20, prefill="chunked"), ShiftKVCache(case.model, budget=20)
    greedy(case.model, inputs, cache, prefill_chunk_size=30)
    greedy(case.model, inputs, single)
    same = [
        (cache.kept_indices(layer) == single.kept_indices(layer)).float().mean() for layer in range(len(cache.layers))
    ]
    # Chunks round otherwise than a whole prompt, so scores that nearly tie may change places.
    assert min(same) > 0.9


def test_beams_after_chunks():
    model, inputs = models.text_model(), {"input_ids": models.prompt_ids(2, 30)}
    options = {"num_beams": 3}
    expected = greedy(model, inputs, ShiftKVCache(model, budget=9), **options)
    cache = ShiftKVCache(model, budget=9, prefill="chunked")
    assert greedy(model, inputs, cache, prefill_chunk_size=11, **options).sequences.equal(expected.sequences)
    assert cache.kept_indices(0).shape == (6, 2, 9)


def test_each_layer_gives_up_its_prompt_when_the_length_is_known():
    model = models.text_model()
    cache = ShiftKVCache(model, budget=9, prefill="chunked", prompt_length=40)
    held = []
    handle = model.model.layers[2].mlp.register_forward_pre_hook(
        lambda *_: held.append([layer.stored for layer in cache.layers])
    )
    with torch.no_grad():
        for part in models.prompt_ids().split(16, dim=1):
            model(part, past_key_values=cache, use_cache=True)
    handle.remove()
    assert held == [[16] * 3, [32] * 3, [9] * 3]


def test_a_prompt_longer_than_announced_is_refused_before_anything_is_stored():
    model = models.text_model()
    cache = ShiftKVCache(model, budget=9, prefill="chunked", prompt_length=30)
    with torch.no_grad():
        model(models.prompt_ids(1, 16), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="prompt_length=30, but the prompt has at least 32 columns"):
            model(models.prompt_ids(1, 16), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 16
        model(models.prompt_ids(1, 14), past_key_values=cache, use_cache=True)
    assert cache.kept_indices(0).shape[-1] == 9


def test_padding_on_the_right_is_refused_when_the_prompt_ends():
    model = models.text_model()
    cache = ShiftKVCache(model, budget=4, prefill="chunked", prompt_length=12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 10:] = 0
    ids = models.prompt_ids(2, 12)
    with torch.no_grad():
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="row 0 has padding on the right"):
            model(ids[:, 6:], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0


def test_a_model_that_is_set_to_prefill_in_chunks():
    model = models.text_model()
    expected = ShiftKVCache(model, budget=4)
    greedy(model, {"input_ids": models.prompt_ids()}, expected)
    model.generation_config.prefill_chunk_size = 16
    cache = ShiftKVCache(model, budget=4)
    greedy(model, {"input_ids": models.prompt_ids()}, cache)
    assert_same_selection(cache, expected)


def test_a_prompt_under_way_cannot_be_cropped():
    model = models.text_model()
    cache = ShiftKVCache(model, budget=4, prefill="chunked")
    with torch.no_grad():
        model(models.prompt_ids(), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="the prompt is not complete yet"):
        cache.crop(-1)
    assert cache.get_seq_length() == 40
