import sys

import pytest
from PIL import Image

from benchmarks.speed.decoding_pictures import draw_plot
from benchmarks.speed.decoding_report import table
from benchmarks.speed.rows import Row

DONE = Row("Full", 1, 2048, 256, "eager", 20.5, 20.25, 21.0, 48.78, 3 * 2**30, 4 * 2**30, 5 * 2**30)
SMALL = Row("Small", 1, 2048, 256, "compiled", 6.0, 5.5, 6.5, 166.7, 2**20, 2**21, 2**22, graphs=1)
FAILED = Row("Full", 1, 4096, 256, "eager", error="out of memory")


def test_the_table_aligns_numbers_and_explains_them():
    header, full, small, failed, empty, *notes = table([DONE, SMALL, FAILED]).splitlines()
    assert " ".join(full.split()) == "1 2,048 Full eager 20.50 (20.25 - 21.00) 48.8 3.00 GiB 4.00 GiB 5.00 GiB -"
    assert " ".join(small.split()) == "1 2,048 Small compiled 6.00 (5.50 - 6.50) 166.7 1.0 MiB 2.0 MiB 4.0 MiB 1"
    assert " ".join(failed.split()) == "1 4,096 Full eager out of memory - - - - - -"
    assert len(header) == len(full) == len(small) == len(failed)
    assert empty == ""
    assert [note.split(":")[0] for note in notes] == ["ms/token", "at last token, peak", "graphs"]


def test_late_compilations_and_missing_graphs_are_noted():
    late = Row(
        "Small", 1, 8, 9, "compiled", 6.0, 5.5, 6.5, 166.7, 9, graphs=1, graphs_while_measured=2, cudagraph_skips=1
    )
    _, line, *rest = table([late]).splitlines()
    assert line.endswith("1 + 2*")
    assert [note.split(":")[0] for note in rest[-2:]] == ["+ n", "*"]


def row_of(cache, batch, tokens, milliseconds):
    return Row(cache, batch, tokens, 256, "eager", milliseconds, milliseconds, milliseconds, 1.0, 2**20)


def drawn(rows, path):
    draw_plot(rows, "title").savefig(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def test_more_batch_sizes_are_more_panels(tmp_path):
    def at(*batches):
        cases = [(batch, tokens, name) for batch in batches for tokens in (8, 16, 32, 64, 128) for name in "abcd"]
        return [row_of(name, batch, tokens, 5.0) for batch, tokens, name in cases]

    one, two, three = (drawn(at(*batches), tmp_path / "plot.png") for batches in ((1,), (1, 8), (1, 8, 16)))
    assert two[1] == one[1]
    assert two[0] > 1.4 * one[0]
    assert three[0] == two[0]
    assert three[1] > 1.5 * two[1]


@pytest.mark.parametrize("rows", [[FAILED], [DONE], [SMALL, FAILED]])
def test_plots_of_little(rows, tmp_path):
    assert min(drawn(rows, tmp_path / "plot.png")) > 300


def test_bars_are_times_and_lines_memory():
    (panel, memory) = draw_plot([DONE, SMALL, FAILED], "title").axes
    assert sorted(bar.get_height() for bar in panel.patches) == [6.0, 20.5]
    assert [line.get_ydata().tolist() for line in memory.lines] == [[3.0], [2**-10]]
    assert [text.get_text().strip() for text in panel.texts] == ["20.5", "out of memory", "6.0"]
    # The lines are above the highest bar, in the same height of the panel.
    low, high = memory.get_ylim()
    assert low < 2**-10 < 3.0 < high
    to_pixels, bar_to_pixels = memory.transData, panel.transData
    assert to_pixels.transform((0, 2**-10))[1] > bar_to_pixels.transform((0, 21.0))[1]


def test_bars_that_leave_the_others_no_space_are_broken():
    times = {"Slow": 60.0, "Full": 15.0, "Small": 5.0}
    panel, _ = draw_plot([row_of(name, 1, 8, one) for name, one in times.items()], "title").axes
    assert [bar.get_height() for bar in panel.patches] == pytest.approx([18.0, 15.0, 5.0])
    assert [text.get_text() for text in panel.texts] == ["60.0", "15.0", "5.0"]
    assert max(panel.get_yticks()) <= 18
    # Not where the others can be read.
    times["Full"] = 30.0
    panel, _ = draw_plot([row_of(name, 1, 8, one) for name, one in times.items()], "title").axes
    assert [bar.get_height() for bar in panel.patches] == [60.0, 30.0, 5.0]


def test_the_same_cache_decoded_otherwise_is_hatched_and_has_no_line():
    names = ["Full", "Small, 8", "Small, 8, ahead", "Small, 80"]
    figure = draw_plot([row_of(name, 1, 8, 5.0) for name in names], "title")
    panel, memory = figure.axes
    full, small, ahead, large = (bar.get_facecolor() for bar in panel.patches)
    assert len({full, small, large}) == 3
    assert ahead == small
    assert [bool(bar.get_hatch()) for bar in panel.patches] == [False, False, True, False]
    assert len(memory.lines) == 3


def test_panels_are_as_wide_as_their_lengths_need_and_the_legend_has_all_caches():
    names = ["Full", "Small", "Smaller", "Smallest"]
    rows = [row_of(name, 1, tokens, 5.0) for tokens in (8, 16, 32, 64) for name in names[1:]]
    figure = draw_plot([*rows, *(row_of(name, 8, 8, 5.0) for name in reversed(names))], "title")
    figure.draw_without_rendering()
    first, second, *_ = figure.axes
    assert first.get_position().width > 1.5 * second.get_position().width
    assert len(first.patches) == 12
    assert len(second.patches) == 4
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == sorted(f"{name} (eager)" for name in names)
    assert legend.get_window_extent().y1 < first.get_window_extent().y0


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mmshiftkv\[plot\]"'):
        draw_plot([DONE], "title")
