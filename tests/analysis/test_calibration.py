import json
from itertools import pairwise

import matplotlib.figure
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import models
from mmshiftkv import CACHE_ARGUMENT, Calibration, ShiftKVCache, ShiftKVConfig, measure_statistics
from mmshiftkv.analysis.calibration import LayerStatistics

NEW = 12


def states_of(model, ids, mask=None):
    """Each layer's attention input for whole sequences, (layers, B, T, d), from the model's own hidden states."""
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack([block.input_layernorm(x) for block, x in zip(model.model.layers, states, strict=False)])


def expected_statistics(model, ids, mask, ends=()):
    """Rows of (prefill mean, prefill std, decode mean, decode std), (B, layers, 4), of sequences run in one pass."""
    sequences = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    rows = []
    for sequence, columns in zip(sequences, mask.bool(), strict=True):
        prompt, answer = sequence[: len(columns)][columns].tolist(), sequence[len(columns) :].tolist()
        fed = next((number for number, token in enumerate(answer) if token in ends), len(answer) - 1)
        states = states_of(model, torch.tensor([prompt + answer[:fed]]))[:, 0]
        parts = states[:, : len(prompt)], states[:, len(prompt) :]
        assert parts[1].shape[1] == fed
        rows.append(torch.stack([f(part.flatten(1), dim=1) for part in parts for f in (torch.mean, torch.std)], dim=1))
    return torch.stack(rows)


def measured(calibration):
    return torch.tensor(
        [[row.prefill_mean, row.prefill_std, row.decode_mean, row.decode_std] for row in calibration.layers]
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "starcoder2"])
def test_statistics_are_those_of_the_attention_inputs(model_type):
    model = models.text_model(model_type, eos_token_id=None)
    ids = models.prompt_ids()
    calibration = measure_statistics(model, [{"input_ids": ids}], max_new_tokens=NEW)
    expected = expected_statistics(model, ids, torch.ones_like(ids))[0]
    torch.testing.assert_close(measured(calibration), expected, atol=1e-5, rtol=1e-4)
    assert (calibration.prompts, calibration.prefill_tokens, calibration.decode_tokens) == (1, 40, NEW - 1)
    assert calibration.ratios == pytest.approx((expected[:, 3] / expected[:, 1]).tolist(), rel=1e-4)
    assert calibration.gamma() == calibration.ratios


def test_prompts_are_averaged_with_equal_weight_and_the_range_of_their_ratios_is_kept():
    model = models.text_model(eos_token_id=None)
    prompts = [{"input_ids": models.prompt_ids(1, tokens, seed=tokens)} for tokens in (9, 40, 77)]
    alone = [measure_statistics(model, [prompt], max_new_tokens=NEW) for prompt in prompts]
    together = measure_statistics(model, iter(prompts), max_new_tokens=NEW)
    torch.testing.assert_close(measured(together), torch.stack([measured(one) for one in alone]).mean(dim=0))
    for layer, row in enumerate(together.layers):
        ratios = [one.ratios[layer] for one in alone]
        assert (row.lowest_ratio, row.highest_ratio) == pytest.approx((min(ratios), max(ratios)))
    assert together.prefill_tokens == 9 + 40 + 77


def test_padding_and_the_pad_tokens_of_ended_rows_are_left_out():
    model = models.text_model(eos_token_id=None)
    inputs = models.left_padded([40, 13, 25])
    answers = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, 40:].tolist()
    # A token that ends one row early and another one not at all.
    end = next(token for token in answers[1][1:] if token not in answers[0] and token != answers[1][0])
    model.generation_config.eos_token_id = [end]
    model.generation_config.pad_token_id = 0
    expected = expected_statistics(model, **{"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}, ends=[end])
    calibration = measure_statistics(model, [inputs], max_new_tokens=NEW)
    torch.testing.assert_close(measured(calibration), expected.mean(dim=0), atol=1e-5, rtol=1e-4)
    assert calibration.prefill_tokens == 40 + 13 + 25
    assert calibration.decode_tokens < 3 * (NEW - 1)


def test_rows_without_a_decoded_token_are_left_out():
    model = models.text_model(eos_token_id=None)
    prompts = [{"input_ids": models.prompt_ids(seed=seed)} for seed in (0, 1)]
    first = [model.generate(**prompt, max_new_tokens=NEW, do_sample=False)[0, 40:].tolist() for prompt in prompts]
    assert first[0][0] not in first[1]
    model.generation_config.eos_token_id = first[0][0]
    calibration = measure_statistics(model, prompts, max_new_tokens=NEW)
    assert calibration == measure_statistics(model, prompts[1:], max_new_tokens=NEW)
    with pytest.raises(ValueError, match="every answer ended with its first token"):
        measure_statistics(model, prompts[:1], max_new_tokens=NEW)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "vicuna", "mistral"])
def test_image_prompts(vision_case, family):
    case = vision_case(family)
    inputs = case.prompts(3)
    calibration = measure_statistics(case.model, [inputs], max_new_tokens=NEW)
    assert calibration.prompts == 3
    assert calibration.prefill_tokens == int(inputs["attention_mask"].sum())
    assert len(calibration.ratios) == calibration.num_layers == case.model.config.get_text_config().num_hidden_layers
    assert min(calibration.ratios) > 0


def test_a_prompt_prefilled_in_chunks_is_still_the_prompt():
    model = models.text_model(eos_token_id=None)
    whole = measure_statistics(model, [{"input_ids": models.prompt_ids()}], max_new_tokens=NEW)
    model.generation_config.prefill_chunk_size = 16
    chunked = measure_statistics(model, [{"input_ids": models.prompt_ids()}], max_new_tokens=NEW)
    torch.testing.assert_close(measured(chunked), measured(whole))


def test_layers_that_are_never_compressed_are_not_measured():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = models.text_model("qwen2", use_sliding_window=True, sliding_window=16, layer_types=kinds)
    calibration = measure_statistics(model, [{"input_ids": models.prompt_ids()}], max_new_tokens=NEW)
    assert [row.index for row in calibration.layers] == [0, 2]
    assert calibration.gamma() == (calibration.ratios[0], 1.0, calibration.ratios[1])
    assert ShiftKVCache(model, budget=8, gamma=calibration.gamma()).config.gamma == calibration.gamma()


def test_neither_hooks_nor_random_state_are_touched_even_when_generate_raises():
    model = models.text_model()
    state = torch.get_rng_state()

    def fail(module, args):
        raise RuntimeError("stop")

    measure_statistics(model, [{"input_ids": models.prompt_ids()}], max_new_tokens=NEW)
    assert models.hooks_on(model) == 0
    for module in (model.model.layers[1], model.lm_head):
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            measure_statistics(model, [{"input_ids": models.prompt_ids()}], max_new_tokens=NEW)
        handle.remove()
        assert models.hooks_on(model) == 0
    assert torch.get_rng_state().equal(state)


def test_a_calibration_is_saved_loaded_and_printed(tmp_path):
    model = models.text_model()
    calibration = measure_statistics(model, [{"input_ids": models.prompt_ids()}], max_new_tokens=NEW)
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    record = json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8"))
    assert [row["ratio"] for row in record["layers"]] == list(calibration.ratios)
    header, *rows, last = str(calibration).splitlines()
    assert header.split("  ")[0] == "layer"
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert [float(row.split()[5]) for row in rows] == pytest.approx(calibration.ratios, abs=1e-3)
    assert last == f"1 prompts, 40 prompt tokens, {calibration.decode_tokens} decoded tokens"


@pytest.mark.parametrize("text", ["[]", "{}", "no", '{"layers": [3]}', '{"layers": []}', '{"layers": 3}'])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json' is no calibration"):
        Calibration.load(tmp_path / "other.json")


def test_the_ratios_are_drawn():
    model = models.text_model()
    calibration = measure_statistics(model, [{"input_ids": models.prompt_ids()}], max_new_tokens=NEW)
    figure = calibration.draw()
    assert type(figure) is matplotlib.figure.Figure
    (axes,) = figure.axes
    equal, points = axes.lines
    assert list(equal.get_ydata()) == [1, 1]
    assert points.get_xydata().tolist() == [[row.index, row.ratio] for row in calibration.layers]
    (ranges,) = axes.collections
    assert [segment[:, 1].tolist() for segment in ranges.get_segments()] == [
        [row.lowest_ratio, row.highest_ratio] for row in calibration.layers
    ]


@pytest.mark.parametrize("layers", [1, 6, 80])
@pytest.mark.parametrize("ratios", [(0.97, 1.05), (0.4, 0.6), (1.0, 1.0), (20, 38), (0.05, 20)])
def test_the_drawn_axis_holds_all_ratios_and_1_and_has_ticks_to_read_them_by(layers, ratios):
    lowest, highest = ratios
    rows = [LayerStatistics(index, 0, 1, 0, (lowest + highest) / 2, lowest, highest) for index in range(layers)]
    figure = Calibration(layers, 2, 80, 20, tuple(rows)).draw()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (axes,) = figure.axes
    bottom, top = axes.get_ylim()
    assert bottom < min(lowest, 1) <= max(highest, 1) < top
    shown = [
        label for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True) if bottom <= place <= top
    ]
    assert 2 <= len(shown) <= 10
    assert "1" in [label.get_text() for label in shown]
    for labels in (shown, axes.get_xticklabels()):
        boxes = [label.get_window_extent(renderer) for label in labels]
        assert not any(box.overlaps(other) for box, other in pairwise(boxes))
    (legend,) = figure.legends
    for part in (legend, axes.title, axes.yaxis.label):
        box = part.get_window_extent(renderer)
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_a_measured_gamma_changes_the_layers_it_is_for():
    model, ids = models.text_model(), models.prompt_ids()

    def kept(gamma):
        cache = ShiftKVCache(model, ShiftKVConfig(budget=8, gamma=gamma, num_proxies=64, num_groups=8))
        with torch.no_grad():
            model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
        return [cache.kept_indices(layer) for layer in range(3)]

    same, one_other = kept([10, 10, 10]), kept((10, 0, 10))
    for layer, indices in enumerate(kept(10)):
        assert same[layer].equal(indices)
        assert one_other[layer].equal(indices) == (layer != 1)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        ([], {}, ValueError, "prompts is empty"),
        ([models.prompt_ids()], {}, TypeError, "mappings with a tensor 'input_ids', not Tensor"),
        ([{"inputs_embeds": torch.zeros(1, 3, 64)}], {}, TypeError, "mappings with a tensor 'input_ids'"),
        (
            [{"input_ids": models.prompt_ids()}],
            {"max_new_tokens": 1},
            ValueError,
            "max_new_tokens=1 must be an int >= 2",
        ),
        (
            [{"input_ids": models.prompt_ids(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])}],
            {},
            ValueError,
            "padding on the right",
        ),
    ],
)
def test_bad_prompts_are_refused(prompts, options, error, words):
    with pytest.raises(error, match=words):
        measure_statistics(models.text_model(), prompts, **options)


def test_an_unsupported_model_is_refused():
    with pytest.raises(TypeError, match="must be a transformers model"):
        measure_statistics(torch.nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="is not supported: it has no full-attention layer"):
        measure_statistics(models.text_model("mistral", sliding_window=8), [])
    with pytest.raises(ValueError, match="is not supported: it has no list of decoder blocks"):
        measure_statistics(models.text_model("bert"), [])


def test_answers_are_greedy_whatever_the_generation_config_asks_for():
    model = models.text_model(eos_token_id=None)
    expected = measure_statistics(model, [{"input_ids": models.prompt_ids()}], max_new_tokens=NEW)
    model.generation_config.update(do_sample=True, num_beams=2, temperature=2.0)
    assert measure_statistics(model, [{"input_ids": models.prompt_ids()}], max_new_tokens=NEW) == expected
