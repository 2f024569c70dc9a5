import sys

import pytest
from PIL import Image

from decode_report import Row, draw_plot, table

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


def drawn(rows, path):
    draw_plot(rows, "title").savefig(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def test_more_batch_sizes_are_more_panels(tmp_path):
    def at(*batches):
        return [Row(**{**vars(row), "batch": batch}) for batch in batches for row in (DONE, SMALL, FAILED)]

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
    assert [text.get_text().strip() for text in panel.texts] == ["out of memory"]
    # The lines are above the highest bar, in the same height of the panel.
    low, high = memory.get_ylim()
    assert low < 2**-10 < 3.0 < high
    to_pixels, bar_to_pixels = memory.transData, panel.transData
    assert to_pixels.transform((0, 2**-10))[1] > bar_to_pixels.transform((0, 21.0))[1]


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mmshiftkv\[plot\]"'):
        draw_plot([DONE], "title")
