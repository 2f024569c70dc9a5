import sys

import pytest
from PIL import Image

from benchmarks.speed.decoding_pictures import draw_memory, draw_time
from benchmarks.speed.rows import Row

DONE = Row("Full", 1, 2048, 256, "eager", 20.5, 20.25, 21.0, 48.78, 3 * 2**30, 4 * 2**30, 5 * 2**30)
SMALL = Row("Small", 1, 2048, 256, "compiled", 6.0, 5.5, 6.5, 166.7, 2**20, 2**21, 2**22, graphs=1)
FAILED = Row("Full", 1, 4096, 256, "eager", error="out of memory")


def row_of(cache, batch, tokens, milliseconds, size=2**20):
    return Row(cache, batch, tokens, 256, "eager", milliseconds, milliseconds, milliseconds, 1.0, size)


def drawn(draw, rows, path):
    draw(rows, "title").savefig(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize(("draw", "wider"), [(draw_time, 1.4), (draw_memory, 1.0)])
def test_more_batch_sizes_are_more_panels(draw, wider, tmp_path):
    def at(*batches):
        cases = [(batch, tokens, name) for batch in batches for tokens in (8, 16, 32, 64, 128) for name in "abcd"]
        return [row_of(name, batch, tokens, 5.0) for batch, tokens, name in cases]

    batches = (1,), (1, 8), (1, 8, 16)
    assert [len(draw(at(*some), "title").axes) for some in batches] == [1, 2, 3]
    one, two, three = (drawn(draw, at(*some), tmp_path / "plot.png") for some in batches)
    assert two[1] == one[1]
    assert two[0] > wider * one[0]
    assert three[0] == two[0]
    assert three[1] > 1.5 * two[1]


@pytest.mark.parametrize("draw", [draw_time, draw_memory])
@pytest.mark.parametrize("rows", [[FAILED], [DONE], [SMALL, FAILED]])
def test_pictures_of_little(draw, rows, tmp_path):
    assert min(drawn(draw, rows, tmp_path / "plot.png")) > 300


def test_bars_are_times():
    (panel,) = draw_time([DONE, SMALL, FAILED], "title").axes
    assert sorted(bar.get_height() for bar in panel.patches) == [6.0, 20.5]
    assert [text.get_text().strip() for text in panel.texts] == ["20.5", "out of memory", "6.0"]


def test_lines_are_memory_on_a_log_axis():
    (panel,) = draw_memory([DONE, SMALL, FAILED], "title").axes
    assert [line.get_ydata().tolist() for line in panel.lines] == [[3 * 2**30], [2**20]]
    assert panel.get_yscale() == "log"
    low, high = panel.get_ylim()
    assert low < 2**20 < 3 * 2**30 < high
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels[0] == "1 MiB"
    assert labels[-1] == "4 GiB"


@pytest.mark.parametrize("draw", [draw_time, draw_memory])
def test_all_panels_have_one_scale(draw):
    rows = [row_of("Full", batch, 8, 5.0 * batch, 2**20 * batch) for batch in (1, 8)]
    one, eight = draw(rows, "title").axes
    assert one.get_ylim() == eight.get_ylim()


def test_bars_are_whole_however_slow_one_cache_is():
    times = {"Slow": 600.0, "Full": 15.0, "Small": 5.0}
    (panel,) = draw_time([row_of(name, 1, 8, one) for name, one in times.items()], "title").axes
    assert [bar.get_height() for bar in panel.patches] == [600.0, 15.0, 5.0]
    assert [text.get_text() for text in panel.texts] == ["600", "15.0", "5.0"]
    assert panel.get_ylim()[0] == 0
    assert panel.get_ylim()[1] > 600


def test_the_same_cache_decoded_otherwise_is_hatched_and_has_no_line():
    rows = [row_of(name, 1, 8, 5.0) for name in ("Full", "Small, 8", "Small, 8, ahead", "Small, 80")]
    (panel,) = draw_time(rows, "title").axes
    full, small, ahead, large = (bar.get_facecolor() for bar in panel.patches)
    assert len({full, small, large}) == 3
    assert ahead == small
    assert [bool(bar.get_hatch()) for bar in panel.patches] == [False, False, True, False]
    (memory,) = draw_memory(rows, "title").axes
    assert [line.get_label() for line in memory.lines] == ["Full", "Small, 8", "Small, 80"]
    assert [line.get_color() for line in memory.lines] == ["#999999", "#56B4E9", "#D55E00"]


def test_panels_are_as_wide_as_their_lengths_need_and_the_legend_has_all_caches():
    names = ["Full", "Small", "Smaller", "Smallest"]
    rows = [row_of(name, 1, tokens, 5.0) for tokens in (8, 16, 32, 64) for name in names[1:]]
    figure = draw_time([*rows, *(row_of(name, 8, 8, 5.0) for name in reversed(names))], "title")
    figure.draw_without_rendering()
    first, second = figure.axes
    assert first.get_position().width > 1.5 * second.get_position().width
    assert len(first.patches) == 12
    assert len(second.patches) == 4
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == sorted(f"{name} (eager)" for name in names)
    assert legend.get_window_extent().y1 < first.get_window_extent().y0


@pytest.mark.parametrize("draw", [draw_time, draw_memory])
def test_missing_matplotlib_is_named(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mmshiftkv\[plot\]"'):
        draw([DONE], "title")
