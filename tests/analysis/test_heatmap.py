import io
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache, draw_heatmap, measure_statistics, visual_token_map
from models import prompt_ids, text_model
from tiny_llava import document_image

QUESTION = "What costs $5 or $6?"
WHITE = Image.new("RGB", (112, 84), "white")


@pytest.fixture(scope="module")
def tiny(vision_case):
    return vision_case("qwen2_5_vl")


def map_of(case, picture, *, question=QUESTION, budget=20, layer=None):
    inputs = case.inputs((question, picture))
    cache = ShiftKVCache(case.model, budget=budget)
    case.model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=1, do_sample=False)
    return visual_token_map(case.model, inputs, cache, layer=layer)


def map_by_hand(case, picture, kept):
    """The map of a prompt with one layer, whose heads keep the visual tokens in these cells, (row, col) by head."""
    inputs = case.inputs((QUESTION, picture))
    columns = visual_token_map(case.model, inputs, torch.zeros(1, 1, 1, dtype=torch.long)).grids[0].columns
    return visual_token_map(
        case.model, inputs, torch.tensor([[[int(columns[cell]) for cell in head] for head in kept]])
    )


def pictures(figure):
    """The colours of the pictures in a figure, from left to right: (h, w, 3) each."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images if axes.images]


def drawn(figure):
    """The words of a figure and the boxes they take, in pixels; and the box of the whole."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    artists = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    blank, color_bar = figure.axes[-2:]
    artists += [color_bar.yaxis.label, *blank.get_yticklabels(), *color_bar.get_yticklabels()]
    found = [text for text in artists if text.get_text() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in found], figure.bbox


def test_a_cell_is_coloured_if_a_head_keeps_it_and_the_darker_the_more(tiny):
    token_map = map_by_hand(tiny, WHITE, [[(0, 0), (2, 3)], [(0, 0), (1, 1)]])
    (colors,) = pictures(draw_heatmap(token_map, WHITE))
    assert colors.shape == (84, 112, 3)
    cells = colors.reshape(3, 28, 4, 28, 3)
    assert np.ptp(cells, axis=(1, 3)).max() == 0
    of_cell = {(row, col): tuple(cells[row, 0, col, 0]) for row in range(3) for col in range(4)}
    assert of_cell[2, 3] == of_cell[1, 1]
    assert sum(of_cell[0, 0]) < sum(of_cell[1, 1]) < 3
    assert len(set(of_cell[1, 1])) > 1
    blank = {cell: color for cell, color in of_cell.items() if cell not in [(0, 0), (2, 3), (1, 1)]}
    assert set(blank.values()) == {(1.0, 1.0, 1.0)}


def test_print_stays_darker_than_its_ground_whatever_the_colour(tiny):
    picture = document_image(112, 84)
    gray = np.asarray(picture.convert("L")) < 128
    everywhere = [(row, col) for row in range(3) for col in range(4)]
    (colors,) = pictures(draw_heatmap(map_by_hand(tiny, picture, [everywhere]), picture))
    assert colors[gray].sum(axis=-1).max() < 0.7 * colors[~gray].sum(axis=-1).max()


def test_llava_has_a_picture_for_base_image_and_crops_and_a_strip_of_row_ends(vision_case):
    case, picture = vision_case("vicuna"), document_image(300, 100)
    token_map = map_of(case, picture)
    figure = draw_heatmap(token_map, picture, tokenizer=case.processor.tokenizer)
    base, crops, strip = pictures(figure)
    assert base.shape == crops.shape == (100, 300, 3)
    assert strip.shape == (4, 1, 3)
    assert [text.get_text().split(" (")[0] for text in figure.texts][-2:] == ["base image", "crops"]
    kept = (np.ptp(crops, axis=-1) > 0).reshape(4, 25, 12, 25).mean(axis=(1, 3)) > 0.5
    assert kept.tolist() == (token_map.counts > 0).tolist()


def test_methods_stand_side_by_side_with_the_same_colours(tiny):
    once, twice = [(0, 0)], [(0, 0)]
    few = map_by_hand(tiny, WHITE, [once, [(1, 1)]])
    many = map_by_hand(tiny, WHITE, [twice, [(0, 0)]])
    figure = draw_heatmap({"few": few, "many": many}, WHITE)
    first, second = pictures(figure)
    assert sum(second[0, 0]) < sum(first[0, 0])
    assert [text.get_text() for text in figure.texts][::2] == ["few", "many"]
    (alone,) = pictures(draw_heatmap(few, WHITE))
    assert sum(alone[0, 0]) < sum(first[0, 0])


def test_the_lines_of_names_and_title_stay_apart_and_names_begin_in_bold(tiny):
    token_map = map_by_hand(tiny, WHITE, [[(0, 0)]])
    figure = draw_heatmap({"ShiftKV\nanswer: 5": token_map, "SnapKV": token_map}, WHITE, title="Why?\nSo.")
    assert [(text.get_text(), text.get_weight()) for text in figure.texts] == [
        ("Why?\nSo.", "normal"),
        ("ShiftKV", "bold"),
        ("answer: 5", "normal"),
        ("100 % of the kept tokens are visual", "normal"),
        ("SnapKV", "bold"),
        ("100 % of the kept tokens are visual", "normal"),
    ]
    drawn(figure)
    first, second = (next(text for text in figure.texts if text.get_text() == name) for name in ("ShiftKV", "SnapKV"))
    assert first.get_position()[1] == second.get_position()[1]


def test_the_colour_bar_is_white_at_zero_and_has_a_colour_for_each_count(tiny):
    token_map = map_by_hand(tiny, WHITE, [[(0, 0), (1, 1)], [(0, 0), (2, 2)], [(0, 0), (2, 2)]])
    figure = draw_heatmap(token_map, WHITE)
    *_, blank, bar = figure.axes
    assert blank.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert [label.get_text() for label in blank.get_yticklabels()] == ["0"]
    assert blank.get_window_extent().y1 < bar.get_window_extent().y0
    assert bar.get_ylabel().replace("\n", " ") == "KV heads that keep the token, of 3 in layer 0"
    assert bar.get_ylim() == (0.5, 3.5)
    steps = figure.axes[-1].collections[-1].to_rgba([1, 2, 3])[:, :3]
    (colors,) = pictures(figure)
    assert np.allclose([colors[28, 28], colors[83, 83], colors[0, 0]], steps)
    assert steps.min(axis=1).max() < 1


def test_the_text_stands_below_in_its_order_and_each_token_has_its_colour(tiny):
    token_map = map_of(tiny, WHITE)
    figure = draw_heatmap(token_map, WHITE, tokenizer=tiny.processor.tokenizer)
    words = [text for axes in figure.axes for text in axes.texts]
    shown = "".join(word.get_text() for word in words)
    prompt = tiny.processor.tokenizer.decode(token_map.text_ids).replace("\n", "\u21b5")
    assert shown.replace("[image]", "") == prompt
    assert shown.count("[image]") == 1
    assert f"[image]<|vision_end|>{QUESTION}" in shown
    grounds = sum(len(axes.patches) for axes in figure.axes if axes.texts)
    assert grounds == int((token_map.text_counts > 0).sum())
    assert not any(axes.texts for axes in draw_heatmap(token_map, WHITE).axes)


def test_only_the_last_lines_of_a_long_text_are_shown(tiny):
    token_map = map_of(tiny, WHITE, question="Why? " * 60)
    figures = [draw_heatmap(token_map, WHITE, tokenizer=tiny.processor.tokenizer, text_lines=n) for n in (2, 5, 50)]
    heights = [figure.get_figheight() for figure in figures]
    assert heights == sorted(set(heights))
    for figure in figures:
        words = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert "".join(words).endswith("assistant\u21b5")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral"])
@pytest.mark.parametrize("size", [(112, 112), (420, 56), (56, 420)])
def test_nothing_is_cut_off_or_covered(vision_case, family, size):
    case, picture = vision_case(family), document_image(*size)
    token_map = map_of(case, picture, question="What are the Name, the Date and the $Total$? " * 4)
    names = "ShiftKV, budget 64\n" + "answer: a long one, 123 " * 9, "WWW" * 60 + "\n" + "WWW" * 60, "SnapKV: short"
    maps = dict.fromkeys(names, token_map)
    figure = draw_heatmap(maps, picture, tokenizer=case.processor.tokenizer, title="Why is that so? " * 30 + "\nNo.")
    words, whole = drawn(figure)
    for text, box in words:
        assert whole.x0 <= box.x0, text
        assert box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0, text
        assert box.y1 <= whole.y1, text
    headings = words[: len(figure.texts)]
    for text, box in headings:
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes), text
        assert [other for other, place in headings if box.overlaps(place)] == [text]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_figure_is_written_without_a_display(tiny, ending):
    figure = draw_heatmap(map_of(tiny, WHITE), WHITE, tokenizer=tiny.processor.tokenizer, title="Why?")
    assert type(figure) is Figure
    stream = io.BytesIO()
    figure.savefig(stream, format=ending, dpi=50)
    assert stream.getvalue()


def test_dark_and_gray_pictures_are_drawn(tiny):
    for picture in (Image.new("L", (112, 84), 0), document_image(112, 84).point(lambda value: value // 8)):
        token_map = map_by_hand(tiny, picture.convert("RGB"), [[(0, 0)]])
        (colors,) = pictures(draw_heatmap(token_map, picture))
        assert np.ptp(colors[:28, :28], axis=-1).min() > 0
        assert np.ptp(colors[28:, 28:], axis=-1).max() == 0


def test_bad_requests_are_refused(tiny):
    token_map = map_of(tiny, WHITE)
    with pytest.raises(ValueError, match="maps is empty"):
        draw_heatmap({}, WHITE)
    with pytest.raises(ValueError, match="text_lines=0 must be an int >= 1"):
        draw_heatmap(token_map, WHITE, text_lines=0)
    with pytest.raises(ValueError, match="maps: 'all' and 'one' are not of the same image and layers"):
        draw_heatmap({"all": token_map, "one": map_of(tiny, WHITE, layer=1)}, WHITE)


def test_missing_matplotlib_is_named(tiny, monkeypatch):
    calibration = measure_statistics(text_model(), [{"input_ids": prompt_ids()}], max_new_tokens=4)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: draw_heatmap(map_of(tiny, WHITE), WHITE), calibration.draw):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "mmshiftkv\[plot\]"'):
            draw()
