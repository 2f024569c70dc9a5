import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache

import models
from mmshiftkv import ShiftKVCache


def run(model, cache, ids=None, **inputs):
    with torch.no_grad():
        return model(models.prompt_ids() if ids is None else ids, past_key_values=cache, use_cache=True, **inputs)


def selections(cache):
    return [cache.kept_indices(index) for index in range(len(cache.layers))]


def assert_equal_selections(one, other):
    assert all(mine.equal(theirs) for mine, theirs in zip(selections(one), selections(other), strict=True))


@pytest.fixture
def model():
    return models.text_model()


def test_hooks_live_during_a_prefill_only(model):
    counts = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: counts.append(models.hooks_on(model)))
    cache = ShiftKVCache(model, budget=4)
    assert models.hooks_on(model) == 1
    run(model, cache)
    assert models.hooks_on(model) == 1
    run(model, cache, models.prompt_ids(1, 1))
    run(model, cache, models.prompt_ids(1, 5))
    handle.remove()
    assert counts[0] > 1
    assert counts[1:] == [1, 1]


def test_later_blocks_get_their_hooks_when_the_first_has_run(model):
    """Until then a GPU has nothing to do and waits for Python."""
    first, second, third = model.model.layers
    counts, cache = [], ShiftKVCache(model, budget=4)

    def count(*_):
        counts.append([models.hooks_on(block) for block in (first, second, third)])

    with first.mlp.register_forward_pre_hook(count), second.input_layernorm.register_forward_pre_hook(count):
        run(model, cache)
    # One of each of the first two blocks is this test's own.
    assert counts == [[2, 1, 0], [1, 3, 2]]
    assert models.hooks_on(model) == 0


def test_a_prompts_positions_go_with_its_pass(model, no_garbage_collection):
    seen, cache = [], ShiftKVCache(model, budget=4)

    def see(module, args, output):
        seen.extend(map(weakref.ref, output))

    with model.model.rotary_emb.register_forward_hook(see):
        run(model, cache)
    assert (len(seen), cache.get_seq_length()) == (2, 40)
    assert [factor() for factor in seen] == [None, None]


def test_a_dynamic_cache_on_the_same_model_is_untouched(model):
    expected = run(model, DynamicCache(config=model.config)).logits
    cache = ShiftKVCache(model, budget=4)
    run(model, cache)
    assert run(model, DynamicCache(config=model.config)).logits.equal(expected)


def test_caches_that_take_turns_do_not_see_each_other(model):
    prompts = [models.prompt_ids(seed=seed) for seed in (1, 2)]
    alone = []
    for prompt in prompts:
        alone.append(ShiftKVCache(model, budget=6))
        run(model, alone[-1], prompt)
    first, second = ShiftKVCache(model, budget=6), ShiftKVCache(model, budget=6)
    # Both hear of a forward pass before either runs.
    first.get_mask_sizes(40, 0)
    run(model, second, prompts[1])
    run(model, first, prompts[0])
    assert_equal_selections(first, alone[0])
    assert_equal_selections(second, alone[1])
    assert models.hooks_on(model) == 0


def test_caches_in_several_threads(model):
    prompts = [models.prompt_ids(2, 30 + seed, seed=seed) for seed in range(4)]
    expected = []
    for prompt in prompts:
        expected.append(ShiftKVCache(model, budget=5))
        run(model, expected[-1], prompt)
    errors = []

    def prefill(number):
        try:
            for _ in range(12):
                cache = ShiftKVCache(model, budget=5)
                run(model, cache, prompts[number])
                run(model, cache, models.prompt_ids(2, 1))
                assert_equal_selections(cache, expected[number])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=prefill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert models.hooks_on(model) == 0


def test_a_call_without_keywords_is_not_the_caches(model):
    """torch may leave them out while another thread takes a hook off: the output then stands in their place."""
    cache, held = ShiftKVCache(model, budget=4), []
    cache.get_mask_sizes(40, 0)
    block = model.model.layers[0]
    held += [*block._forward_hooks.values(), *block.self_attn._forward_pre_hooks.values()]
    assert len(held) == 2
    for hook in held:
        assert hook(block, (), torch.zeros(1, 1, 4)) is None
    assert models.hooks_on(model) > 0
    run(model, cache)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("where", ["self_attn", "mlp", "post_attention_layernorm"])
def test_an_exception_in_a_layer_leaves_neither_hooks_nor_half_a_prompt(model, where):
    cache = ShiftKVCache(model, budget=4)

    def fail(*_):
        raise ArithmeticError("planted")

    handle = getattr(model.model.layers[1], where).register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="planted"):
        run(model, cache)
    handle.remove()
    assert models.hooks_on(model) == 0
    assert cache.get_seq_length() == 0
    assert selections(cache) == [None] * 3
    run(model, cache)
    expected = ShiftKVCache(model, budget=4)
    run(model, expected)
    assert_equal_selections(cache, expected)


def test_the_exception_is_the_models_own_even_under_other_hooks(model):
    cache = ShiftKVCache(model, budget=4)
    block = model.model.layers[1]
    handles = []

    def cover(*_):
        # After this cache's own hooks were put on, as another thread might do.
        handles.append(block.register_forward_hook(lambda *_: None, always_call=True))
        handles.append(block.mlp.register_forward_hook(fail))

    def fail(*_):
        raise ArithmeticError("planted")

    first = block.register_forward_pre_hook(cover)
    with pytest.raises(ArithmeticError, match="planted"):
        run(model, cache)
    for handle in [first, *handles]:
        handle.remove()
    assert cache.get_seq_length() == 0
    run(model, cache)
    assert cache.get_seq_length() == 40
    assert models.hooks_on(model) == 0


def test_what_an_interrupt_leaves_is_swept_by_the_next_prefill(model):
    cache = ShiftKVCache(model, budget=4)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, cache)
    handle.remove()
    with pytest.raises(ValueError, match=r"interrupted; call reset\(\)"):
        run(model, cache)
    run(model, ShiftKVCache(model, budget=4))
    assert models.hooks_on(model) == 0
    cache.reset()
    run(model, cache)
    assert cache.get_seq_length() == 40


def test_hooks_go_with_the_cache(model):
    cache = ShiftKVCache(model, budget=4)
    cache.get_mask_sizes(40, 0)
    assert models.hooks_on(model) > 0
    del cache
    gc.collect()
    assert models.hooks_on(model) == 0


def test_a_deep_copy_has_neither_hooks_nor_a_model_of_its_own(model):
    cache = ShiftKVCache(model, budget=4)
    cache.get_mask_sizes(40, 0)
    before = models.hooks_on(model)
    twin = copy.deepcopy(cache)
    assert models.hooks_on(model) == before
    assert twin._decoder is cache._decoder
    run(model, twin)
    run(model, cache)
    assert_equal_selections(cache, twin)
    assert models.hooks_on(model) == 0


def test_a_cache_is_not_pickled_with_its_model(model):
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(ShiftKVCache(model, budget=4))


def test_a_cache_of_another_model_is_refused(model):
    other = models.text_model(seed=1)
    cache = ShiftKVCache(other, budget=4)
    with pytest.raises(ValueError, match="the cache was built for another model"):
        run(model, cache)
    assert models.hooks_on(model) == models.hooks_on(other) == 0
    assert cache.get_seq_length() == 0
    run(other, cache)
    assert cache.get_seq_length() == 40


def test_a_ready_made_mask_is_refused(model):
    cache = ShiftKVCache(model, budget=4)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    with pytest.raises(ValueError, match="give it the 2-D one"):
        run(model, cache, attention_mask=mask)
    assert cache.get_seq_length() == 0


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        run(model, ShiftKVCache(model, budget=4), torch.zeros(1, 0, dtype=torch.long))


def test_gradients_may_be_on(model):
    cache, expected = ShiftKVCache(model, budget=4), ShiftKVCache(model, budget=4)
    model(models.prompt_ids(), past_key_values=cache, use_cache=True)
    model(models.prompt_ids(1, 1), past_key_values=cache, use_cache=True)
    run(model, expected)
    assert_equal_selections(cache, expected)
    assert not cache.layers[0].keys.requires_grad


def test_sampling_of_tokens_is_not_disturbed(model):
    def sample(cache):
        torch.manual_seed(11)
        return model.generate(models.prompt_ids(), past_key_values=cache, do_sample=True, max_new_tokens=12)

    expected = sample(DynamicCache(config=model.config))
    assert sample(ShiftKVCache(model, budget=40)).equal(expected)
    compressed = sample(ShiftKVCache(model, budget=10))
    bystander = ShiftKVCache(model, budget=3)
    run(model, bystander)
    assert sample(ShiftKVCache(model, budget=10)).equal(compressed)
