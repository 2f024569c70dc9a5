import copy
import json

import pytest

from benchmarks.speed import speed_and_memory
from benchmarks.speed.checking import compare
from benchmarks.speed.figures import Time
from test_speed_and_memory import RESULTS

RUN = ["--random-weights", "tiny", "--device", "cpu", "--lengths", "20", "--budgets", "8", "--new-tokens", "6"]
RUN += ["--batches", "2", "--repeats", "2"]
SHIFTKV = "2 x 20 + 6, ShiftKVCache, budget 8"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What two real runs wrote, of decoding and of the selection."""
    folder = tmp_path_factory.mktemp("records")
    decoding, selection = folder / "decoding.json", folder / "selection.json"
    speed_and_memory.main([*RUN, "--json", str(decoding)])
    speed_and_memory.main(["--selection", "--tiny", "--repeats", "2", "--json", str(selection)])
    return decoding, selection


@pytest.fixture
def decoding(files):
    """The record of decoding, its times such that nothing is left to chance: 4 ms, runs 5 % apart from their median."""
    record = json.loads(files[0].read_text(encoding="utf-8"))
    for row in record["rows"]:
        row |= {"milliseconds": 4.0, "fastest": 3.8, "slowest": 4.2}
    return record


@pytest.fixture
def selection(files):
    return json.loads(files[1].read_text(encoding="utf-8"))


def changed(record, rows, cache, **values):
    """A copy in which the rows of a cache, or method, have other values; a function is given the value that was."""
    record = copy.deepcopy(record)
    found = [row for row in record[rows] if cache in (row.get("cache"), row.get("method"))]
    assert found
    for row in found:
        row |= {name: value(row[name]) if callable(value) else value for name, value in values.items()}
    return record


def times(factor):
    return {name: lambda value: factor * value for name in ("milliseconds", "fastest", "slowest")}


def worse(comparison):
    return [(*change.key, change.verdict) for change in comparison.changes if change.is_worse]


def test_a_run_is_as_it_was_itself(decoding, selection):
    for record in (decoding, selection):
        comparison = compare([record], record)
        assert comparison.passed
        assert comparison.times >= 4
        assert comparison.not_compared == comparison.notes == []
        assert {change.verdict for change in comparison.changes} == {"as recorded"}


def test_a_slower_host_is_no_change(decoding):
    slower_host = decoding
    for cache in ("DynamicCache", "StaticCache", "ShiftKVCache, budget 8", "ShiftKVCache, budget 8, decode_ahead"):
        slower_host = changed(slower_host, "rows", cache, **times(5))
    comparison = compare([slower_host], decoding)
    assert comparison.passed
    assert {change.verdict for change in comparison.changes} == {"as recorded"}


def test_a_slower_cache_is_named(decoding):
    now = changed(decoding, "rows", "ShiftKVCache, budget 8", **times(1.3))
    comparison = compare([now], decoding)
    assert not comparison.passed
    assert worse(comparison) == [(SHIFTKV, f"time to {full}'s", "slower") for full in ("DynamicCache", "StaticCache")]


def test_a_faster_cache_passes_and_is_named(decoding):
    now = changed(decoding, "rows", "ShiftKVCache, budget 8", **times(0.7))
    comparison = compare([now], decoding)
    assert comparison.passed
    found = [change.key[0] for change in comparison.changes if change.verdict == "faster"]
    assert found == [SHIFTKV, SHIFTKV]


def test_what_runs_spread_is_allowed_beside_the_tolerance(decoding):
    # Four medians of runs that are up to 5 % away from theirs: 10 %, beside the tolerance of 10 %.
    for factor, passes in ((1.19, True), (1.21, False)):
        now = changed(decoding, "rows", "ShiftKVCache, budget 8", **times(factor))
        assert compare([now], decoding).passed is passes
    now = changed(decoding, "rows", "ShiftKVCache, budget 8", **times(1.21))
    assert compare([now], decoding, tolerance=0.12).passed
    assert Time(2.0, 1.8, 2.2).to(Time(4.0, 4.0, 4.0)).spread == pytest.approx(0.1)


def test_ratios_between_compiled_and_eager_decoding_are_not_judged(decoding):
    for cache in ("StaticCache", "ShiftKVCache, budget 8", "ShiftKVCache, budget 8, decode_ahead"):
        decoding = changed(decoding, "rows", cache, decoding="compiled")
    faster_host = changed(decoding, "rows", "DynamicCache", **times(0.3))
    comparison = compare([faster_host], decoding)
    assert comparison.passed
    assert comparison.times == 2
    found = [change.key[1] for change in comparison.changes if change.verdict == "slower"]
    assert found == ["time to DynamicCache's"] * 2
    without = copy.deepcopy(decoding)
    without["rows"] = [row for row in without["rows"] if row["cache"] != "StaticCache"]
    assert not compare([without], without).passed


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"cache_bytes": lambda size: size + 1}, "held by the cache"),
        ({"decoding": "eager"}, "decoded eagerly"),
        ({"graphs_while_measured": 1}, "graphs while measured"),
        ({"cudagraph_skips": 1}, "cudagraph skips"),
        ({"peak_bytes": 120 * 2**20}, "peak"),
        ({"error": "out of memory", "milliseconds": None}, "runs out of memory"),
    ],
)
def test_more_than_was_is_named(decoding, values, what):
    cache = "ShiftKVCache, budget 8"
    decoding = changed(decoding, "rows", cache, decoding="compiled", peak_bytes=100 * 2**20)
    decoding = changed(decoding, "rows", "StaticCache", decoding="compiled")
    comparison = compare([changed(decoding, "rows", cache, **values)], decoding)
    assert worse(comparison) == [(SHIFTKV, what, "more")]
    back = compare([decoding], changed(decoding, "rows", cache, **values))
    assert worse(back) == []
    assert [change.verdict for change in back.changes if change.key == (SHIFTKV, what)] == ["less"]


def test_few_allocated_bytes_more_are_as_recorded(decoding):
    decoding = changed(decoding, "rows", "ShiftKVCache, budget 8", peak_bytes=100 * 2**20)
    now = changed(decoding, "rows", "ShiftKVCache, budget 8", peak_bytes=117 * 2**20)
    assert compare([now], decoding).passed


def test_what_is_missing_is_said(decoding):
    now = copy.deepcopy(decoding)
    now["rows"] = [row for row in now["rows"] if not row["cache"].endswith("decode_ahead")]
    comparison = compare([now], decoding)
    assert comparison.passed
    assert comparison.not_compared == [f"recorded, not measured now: {SHIFTKV}, decode_ahead"]
    now["rows"] = now["rows"][:1]
    comparison = compare([now], decoding)
    assert not comparison.passed
    assert comparison.times == 0
    assert len(comparison.not_compared) == 3


@pytest.mark.parametrize("settings", [{"model": "another"}, {"dtype": "bfloat16"}, {"attention": "eager"}])
def test_other_settings_are_not_compared(decoding, settings):
    now = {**decoding, "settings": decoding["settings"] | settings}
    comparison = compare([now], decoding)
    assert not comparison.passed
    assert comparison.changes == []
    ((name, value),) = settings.items()
    assert f"{name} {value}" in comparison.not_compared[0]
    assert "recorded: measured decoding, model tiny, random weights" in comparison.not_compared[0]
    assert compare([now, decoding], decoding).passed


def test_a_gpu_is_not_compared_with_a_cpu_and_other_versions_are_noted(decoding):
    gpu = {**decoding, "environment": decoding["environment"] | {"device": "NVIDIA H200"}}
    assert not compare([gpu], decoding).passed
    another = {**decoding, "environment": gpu["environment"] | {"device": "NVIDIA H100", "torch": "9.9"}}
    comparison = compare([another], gpu)
    assert comparison.passed
    assert comparison.notes[0] == "device: NVIDIA H200 when recorded, NVIDIA H100 now"
    assert comparison.notes[1].endswith("when recorded, 9.9 now")
    once = {**decoding, "settings": decoding["settings"] | {"repeats": 1}}
    assert compare([once], decoding).notes == ["measured now from one run each: what runs spread is not known"]


def test_a_slower_selection_and_a_slower_prefill_are_named(selection):
    now = changed(selection, "selection", "values", selection=lambda value: 1.2 * value)
    found = [(f"selection, 1 x {tokens}, values, budget 8", "time to the least", "slower") for tokens in (33, 64)]
    assert worse(compare([now], selection)) == found
    selection = changed(selection, "selection", "published", launches=13)
    now = changed(selection, "selection", "published", launches=14, eager=lambda value: 2 * value)
    assert [key[1:] for key in worse(compare([now], selection))] == [("launches", "more")] * 2
    exact = {"fastest": 1.0, "seconds": 1.0, "slowest": 1.0}
    for row in selection["prefill"]:
        row |= exact
    now = changed(selection, "prefill", "ShiftKVCache 8, asked", seconds=1.2)
    found = [
        (f"prefill, 1 x {tokens}, ShiftKVCache 8, asked", "time to DynamicCache's", "slower") for tokens in (33, 64)
    ]
    assert worse(compare([now], selection)) == found


def run(*arguments):
    """The status that the script ends with."""
    try:
        speed_and_memory.main(list(arguments))
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_the_script_compares_what_it_measured(files, capsys):
    decoding, selection = map(str, files)
    assert run(*RUN, "--budgets", "8", "16", "--check", decoding, "--tolerance", "1000") == 0
    printed = capsys.readouterr().out
    assert f"compared with {decoding}\n" in printed
    assert "4 of them times that are judged; 0 worse, 0 better" in printed
    assert "not compared: measured now, in no record: 2 x 20 + 6, ShiftKVCache, budget 16\n" in printed
    assert "Tolerance: 100000%." in printed
    small = ["--selection", "--tiny", "--repeats", "2", "--tolerance", "1000"]
    assert run(*small, "--check", selection) == 0
    assert "14 of them times that are judged; 0 worse" in capsys.readouterr().out
    assert run(*small, "--check", selection, decoding) == 1
    printed = capsys.readouterr().out
    assert "not compared: other settings: measured selection, tiny True, device CPU; recorded: measured deco" in printed
    assert "failed: no time could be compared\n" in printed


def test_the_script_says_what_became_slower_in_files_that_it_reads(decoding, files, tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps(decoding))
    now = changed(decoding, "rows", "ShiftKVCache, budget 8", **times(2), cache_bytes=7)
    (tmp_path / "new.json").write_text(json.dumps(now))
    assert run("--read", str(tmp_path / "new.json"), "--check", str(tmp_path / "old.json")) == 1
    printed = capsys.readouterr().out
    assert f"slower: {SHIFTKV}: time to StaticCache's 1.000 -> 2.000\n" in printed
    assert "2 worse, 1 better\n" in printed
    assert run("--read", str(files[1]), "--check", str(files[1])) == 0
    assert "selection, milliseconds per layer" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["decoding", "decoding_batch_8", "joined", "selection"])
def test_the_records_of_this_repository_can_be_compared(name, capsys):
    path = str(RESULTS / f"{name}.json")
    assert run("--read", path, "--check", path) == 0
    assert "0 worse, 0 better" in capsys.readouterr().out


def test_bad_arguments_are_named(files, capsys):
    decoding, selection = map(str, files)
    for arguments, message in (
        (["--tolerance", "0.1"], "--tolerance goes with --check"),
        (["--check", decoding, "--tolerance", "-1"], "needs a number, at least 0, such as 0.1 for a tenth, got '-1'"),
        (["--check", decoding, "--tolerance", "nan"], "got 'nan'"),
        (["--check", str(RESULTS / "compare.json")], "compare.json' is no JSON file of speed_and_memory.py"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    assert "records of decoding and of selection" in run("--read", decoding, selection)
    assert "only records of decoding are drawn" in run("--read", selection, "--plot", "no.png")
