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
