import torch
from transformers import DynamicCache

from benchmarks.quality import recall
from mmshiftkv import ShiftKVCache, make_cache
from tiny_vlm.answering import answer_tokens, build_inputs
from tiny_vlm.pages import BUILTIN_FONTS, held_out_of_task


def prompts(processor, task, count, seed=1):
    examples = list(held_out_of_task(task, count, seed, BUILTIN_FONTS))
    return build_inputs(processor, [one.image for one in examples], [one.question for one in examples])


def test_the_attention_is_that_of_decoding_step_by_step(tiny, monkeypatch):
    model, processor = tiny
    monkeypatch.setattr(recall, "STEPS_AT_ONCE", 7)
    inputs = prompts(processor, "multi", 3)
    tokens = inputs["input_ids"].shape[1]
    cache = DynamicCache(config=model.config)
    answers = answer_tokens(model, inputs, cache, 64)
    found = recall.decode_attention(model, inputs, answers, cache)
    assert model.config._attn_implementation == "sdpa"
    with recall.eager_attention(model):
        output = model.generate(
            **inputs, max_new_tokens=64, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    assert output.sequences[:, tokens:].equal(answers)
    ends = [row.index(processor.tokenizer.eos_token_id) for row in answers.tolist()]
    assert len(set(ends)) > 1
    for layer, mass in enumerate(found):
        # The first pass is the prompt's; the next ones are decoding steps.
        steps = torch.stack([attentions[layer][:, :, 0, :tokens] for attentions in output.attentions[1:]])
        for row, end in enumerate(ends):
            by_head = steps[:end, row].sum(dim=0).unflatten(0, (2, 4)).sum(dim=1)
            torch.testing.assert_close(mass[row], by_head, atol=1e-4, rtol=1e-4)
    assert [mass.shape for mass in found] == [(3, 2, tokens)] * 6
    assert all((mass[inputs["attention_mask"][:, None].expand_as(mass) == 0] == 0).all() for mass in found)


def test_recall_is_the_share_on_what_is_kept(tiny):
    model, processor = tiny
    inputs = prompts(processor, "lookup", 2)
    full = DynamicCache(config=model.config)
    attention = recall.decode_attention(model, inputs, answer_tokens(model, inputs, full, 24), full)
    everything = torch.ones(2, 6)
    torch.testing.assert_close(recall.recall(attention, full), everything)
    covering = ShiftKVCache(model, budget=1.0)
    answer_tokens(model, inputs, covering, 1)
    torch.testing.assert_close(recall.recall(attention, covering), everything)
    cache = make_cache("keydiff", model, 50)
    answer_tokens(model, inputs, cache, 1)
    found = recall.recall(attention, cache)
    for layer, mass in enumerate(attention):
        kept = cache.kept_indices(layer)
        for row in range(2):
            on_kept = sum(mass[row, head, token] for head in range(2) for token in kept[row, head].tolist())
            torch.testing.assert_close(found[row, layer], on_kept / mass[row].sum())


def test_an_answer_of_one_token_has_no_recall(tiny):
    model, processor = tiny
    inputs = prompts(processor, "lookup", 2)
    full = DynamicCache(config=model.config)
    answers = answer_tokens(model, inputs, full, 1)
    assert not recall.decoding_steps(model, answers).any()
    attention = recall.decode_attention(model, inputs, answers, full)
    assert recall.recall(attention, full).isnan().all()
