import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import DynamicCache, LlavaNextConfig, LlavaNextForConditionalGeneration

from benchmarks.quality import compare
from benchmarks.quality.comparison import (
    ALL,
    COMPARED,
    OTHER_FAMILY,
    QWEN_SETTINGS,
    USUAL,
    Result,
    Setup,
    joined,
    read,
    recall_table,
    result_record,
    table,
)
from benchmarks.quality.comparison_picture import STYLES, draw_plot
from benchmarks.quality.peers import PEERS
from benchmarks.quality.scoring import summarize
from common import TINY_LLAVA
from mmshiftkv import ShiftKVCache, ShiftKVConfig

SMALL = ["--count", "2", "--batch-size", "2", "--device", "cpu"]
RESULTS = Path(compare.__file__).parents[1] / "results"
COMMITTED = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))
ALONE = ["--methods", "shiftkv"]
LLAVA = LlavaNextForConditionalGeneration(LlavaNextConfig.from_pretrained(TINY_LLAVA))


def tables(capsys, *arguments):
    """The two tables that the script prints, one list of cells for each line after the headline."""
    compare.main([*SMALL, *arguments])
    scores, recalls = capsys.readouterr().out.split("decode attention recall, percent\n")
    assert scores.startswith("exact match / ANLS, percent\n")
    return [
        [re.split(r"  +", line.strip()) for line in lines if line]
        for lines in (scores.splitlines()[1:], recalls.splitlines())
    ]


def run(capsys, *arguments):
    """The first table, of ShiftKV alone."""
    return tables(capsys, *ALONE, *arguments)[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What one run of the script writes: the parsed JSON file, and the path of the plot."""
    folder = tmp_path_factory.mktemp("compare")
    options = [*ALONE, "--tasks", "lookup", "line", "--budgets", "400", "8", "--seed", "7"]
    options += ["--json", str(folder / "scores.json"), "--plot", str(folder / "plot.png")]
    compare.main([*SMALL, *options])
    return json.loads((folder / "scores.json").read_text(encoding="utf-8")), folder / "plot.png"


def test_the_table_has_a_row_for_each_cache_and_a_column_for_each_task(capsys):
    header, full, large, small = run(capsys, "--tasks", "multi", "lookup", "--budgets", "500", "8")
    assert header == ["cache", "budget", "multi (n=2)", "lookup (n=2)", "mean", "recall"]
    assert full == ["full", "-", *["100.0 / 100.0"] * 3, "100.0"]
    # None of these prompts has 500 tokens: everything is kept, and nothing changes.
    assert large == ["shiftkv", "500", *full[2:]]
    assert small[:2] == ["shiftkv", "8"]
    assert small[2:] != full[2:]


def test_json_holds_settings_versions_and_scores(written):
    scores, _ = written
    assert scores["settings"] == {
        "model": "tiny_qwen2_5_vl",
        "methods": ["shiftkv"],
        "budgets": [400, 8],
        "tasks": ["lookup", "line"],
        "count": 2,
        "batch_size": 2,
        "seed": 7,
        "builtin_font_only": False,
        "document_first": False,
        "device": "cpu",
        "dtype": "float32",
    }
    assert scores["environment"]["torch"] == torch.__version__
    assert scores["environment"]["transformers"] == transformers.__version__
    assert scores["environment"]["python"] == sys.version.split()[0]
    assert scores["environment"]["device"].startswith("cpu")
    assert [(row["method"], row["budget"]) for row in scores["results"]] == [
        ("full", None),
        ("shiftkv", 400),
        ("shiftkv", 8),
    ]
    for row in scores["results"]:
        assert list(row["tasks"]) == ["lookup", "line"]
        assert row["method_settings"] == {}
        for measure in ("exact_match", "anls", "decode_attention_recall"):
            by_task = [task[measure] for task in row["tasks"].values()]
            assert row["mean"][measure] == pytest.approx(sum(one["mean"] for one in by_task) / 2)
            assert all(0 <= one["low"] <= one["mean"] <= one["high"] <= 1 + 1e-6 for one in by_task)
        for task in row["tasks"].values():
            layers = task["decode_attention_recall"]["layers"]
            assert sum(layers) / 6 == pytest.approx(task["decode_attention_recall"]["mean"])
        assert all(task["count"] == 2 for task in row["tasks"].values())


def test_the_full_cache_answers_right_and_a_budget_of_eight_does_not(written):
    full, _, small = (row["mean"]["exact_match"] for row in written[0]["results"])
    assert full == 1.0
    assert small < full


def test_the_plot_is_an_image(written):
    with Image.open(written[1]) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300


def test_every_task_is_asked_the_same_whatever_else_is(capsys):
    alone = run(capsys, "--tasks", "lookup", "--budgets", "16", "--count", "3")
    together = run(capsys, "--tasks", "line", "lookup", "--budgets", "16", "--count", "3")
    assert [row[2] for row in alone] == [row[3] for row in together]


def test_repeated_budgets_and_tasks_are_measured_once(capsys):
    header, *rows = run(capsys, "--tasks", "lookup", "lookup", "--budgets", "9", "9", "--builtin-font-only")
    assert header == ["cache", "budget", "lookup (n=2)", "mean", "recall"]
    assert [row[:2] for row in rows] == [["full", "-"], ["shiftkv", "9"]]


def test_a_setup_makes_a_new_cache_for_each_call(tiny):
    model, _ = tiny
    assert type(Setup().make_cache(model)) is DynamicCache
    shift = Setup("shiftkv", 32)
    first, second = shift.make_cache(model), shift.make_cache(model)
    assert isinstance(first, ShiftKVCache)
    assert first is not second


def test_methods_are_measured_budget_by_budget(capsys):
    methods = ["random", "streaming_llm", "expected_attention", "snapkv", "keydiff", "shiftkv"]
    scores, recalls = tables(capsys, "--tasks", "lookup", "--budgets", "60", "10", "--methods", *methods)
    names = [["full", "-"], *([method, budget] for budget in ("60", "10") for method in methods)]
    assert [row[:2] for row in scores[1:]] == [row[:2] for row in recalls[1:]] == names
    assert recalls[0] == ["cache", "budget", "lookup", *(f"layer {layer}" for layer in range(6))]
    assert recalls[1][2:] == ["100.0"] * 7
    assert [row[-1] for row in scores[1:]] == [row[2] for row in recalls[1:]]
    by_method = {(method, budget): float(recall) for method, budget, recall, *_ in recalls[1:]}
    assert all(0 < by_method[method, "10"] < by_method[method, "60"] < 100 for method in methods)
    assert by_method["shiftkv", "60"] > by_method["random", "60"] + 10


def test_peers_are_measured_like_methods(tmp_path, capsys):
    names = [*PEERS, "half-mass"]
    file = tmp_path / "scores.json"
    scores, recalls = tables(capsys, "--tasks", "lookup", "--budgets", "20", "--methods", *names, "--json", str(file))
    assert [row[:2] for row in scores[1:]] == [["full", "-"], *([name, "20"] for name in names)]
    by_name = {name: float(share) for name, _, share, *_ in recalls[1:]}
    assert max(names, key=by_name.get) == "full_attention"
    recorded = json.loads(file.read_text(encoding="utf-8"))
    settings = {row["method"]: row["method_settings"] for row in recorded["results"]}
    assert settings["criticalkv"] == settings["dropkv"] == settings["snapkv_values"] == {"window": 5}
    assert settings["half-mass"] == {"mass": 0.5}
    assert settings["kvzip"] == settings["full_attention"] == settings["last_query_values"] == {}
    assert [result_record(result)["tasks"] for result in read(recorded)] == [
        row["tasks"] for row in recorded["results"]
    ]


def test_the_page_may_come_before_the_question(tmp_path, capsys):
    path, plot = tmp_path / "scores.json", tmp_path / "plot.png"
    options = ["--document-first", "--methods", "snapkv", "--budgets", "400", "8", "--tasks", "lookup"]
    compare.main([*SMALL, *options, "--json", str(path), "--plot", str(plot)])
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines if line.strip()][1:]
    assert [row[:2] for row in rows] == [["cache", "budget"], ["full", "-"], ["snapkv", "400"], ["snapkv", "8"]]
    assert rows[1][2:] == rows[2][2:] == [*["100.0 / 100.0"] * 2, "-"]
    assert rows[3][2] != "100.0 / 100.0"
    assert json.loads(path.read_text(encoding="utf-8"))["settings"]["document_first"] is True
    assert Image.open(plot).size[0] > 100
    with pytest.raises(SystemExit, match="document_first is True and False"):
        compare.main(["--read", str(path), str(with_settings(path, tmp_path / "other.json", document_first=False))])


def with_settings(path, target, **settings):
    written = json.loads(path.read_text(encoding="utf-8"))
    written["settings"] |= settings
    target.write_text(json.dumps(written), encoding="utf-8")
    return target


def test_methods_are_the_usual_ones_unless_named():
    assert compare.parse_arguments([]).methods == USUAL
    assert USUAL == [
        "random",
        "streaming_llm",
        "expected_attention",
        "snapkv",
        "keydiff",
        "shiftkv",
        "value-aware",
    ]
    assert compare.parse_arguments(["--methods", "snapkv", "all"]).methods == ALL
    assert compare.parse_arguments(["--methods", "kvzip", "dropkv", "kvzip"]).methods == ["kvzip", "dropkv"]


def test_settings_of_the_qwen_family_are_the_defaults_and_change_a_llava_alone():
    for setting, value in QWEN_SETTINGS.items():
        assert getattr(ShiftKVConfig(budget=8), setting) == value
        assert getattr(ShiftKVConfig.for_model(LLAVA, budget=8), setting) != value
    own, other = (Setup(name, 8).make_cache(LLAVA).config for name in ("value-aware", "value-aware-qwen"))
    assert own.replace(**QWEN_SETTINGS) == other
    assert not set(OTHER_FAMILY) & set(compare.parse_arguments(["--methods", "all"]).methods)


def test_a_llava_next_is_asked_about_the_documents(tmp_path):
    options = [*SMALL, *ALONE, "--model", str(TINY_LLAVA), "--tasks", "lookup", "--budgets", "64"]
    compare.main([*options, "--json", str(tmp_path / "scores.json")])
    full, small = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["results"]
    assert full["mean"]["exact_match"] == 1
    assert 0.2 < small["mean"]["decode_attention_recall"] < 1


def test_a_task_of_the_other_model_s_pages_is_refused():
    with pytest.raises(SystemExit, match="'cell' is not asked about the pages of a qwen2_5_vl model; allowed are"):
        compare.main([*SMALL, *ALONE, "--tasks", "cell", "--budgets", "64"])


def test_snapkv_has_at_most_a_quarter_of_the_budget_for_its_window():
    windows = {budget: Setup("snapkv", budget).settings.get("window", 32) for budget in (256, 128, 64, 10, 1)}
    assert windows == {256: 32, 128: 32, 64: 16, 10: 2, 1: 1}
    assert Setup("shiftkv", 10).settings == {}


def test_more_tasks_are_more_panels(tmp_path):
    perfect, wrong = summarize([("a", "a")]), summarize([("a", "b")])

    def drawn(*tasks):
        results = [Result(Setup(), dict.fromkeys(tasks, perfect))]
        results += [
            Result(Setup(method, budget), dict.fromkeys(tasks, wrong))
            for budget in (16, 8)
            for method in ("random", "snapkv", "shiftkv")
        ]
        draw_plot(results).savefig(tmp_path / "plot.png")
        text = table(results)
        assert [line.split()[:2] for line in text.splitlines()[2:] if line] == [
            ["full", "-"],
            *([method, budget] for budget in ("16", "8") for method in ("random", "snapkv", "shiftkv")),
        ]
        assert recall_table(results) == ""
        with Image.open(tmp_path / "plot.png") as image:
            return image.size

    single, double, five = drawn("lookup"), drawn("lookup", "line"), drawn("a", "b", "c", "d", "e")
    assert double[1] == single[1]
    assert double[0] > 1.5 * single[0]
    assert five[1] > 1.5 * double[1]


def test_the_picture_has_the_names_of_the_readme():
    figure = draw_plot(read(COMMITTED))
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["lookup", "multi-field", "line", "whole page", "decode attention recall, all tasks", ""]
    legend = figure.axes[-1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "ShiftKV",
        "ExpectedAttention",
        "SnapKV",
        "KeyDiff",
        "StreamingLLM",
        "Random",
        "full cache",
    ]


def test_methods_with_the_same_score_are_all_seen():
    assert set(STYLES) == set(COMPARED)
    whole_page = draw_plot(read(COMMITTED)).axes[3]
    marked = [line for line in whole_page.lines if line.get_linestyle() == "None"]
    assert len({line.get_marker() for line in marked}) == len({line.get_color() for line in marked}) == 6
    at_zero = [x for line in marked for x, y in line.get_xydata() if y == 0]
    assert len(at_zero) > 10
    assert len(set(at_zero)) == len(at_zero)
    for line in marked:
        for x, budget in zip(line.get_xdata(), (16, 32, 64, 128), strict=True):
            assert x == pytest.approx(budget, rel=0.15)


@pytest.mark.parametrize("tasks", [["lookup"], ["lookup", "multi", "line", "all"]])
def test_all_methods_together_are_told_apart(tasks):
    wrong = dict.fromkeys(tasks, summarize([("a", "b")]))
    results = [Result(Setup(), wrong)]
    results += [Result(Setup(name, budget), wrong) for budget in (32, 16) for name in COMPARED]
    figure = draw_plot(results)
    panel = figure.axes[0]
    marked = [line for line in panel.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert len(marked) == len(COMPARED)
    assert len({line.get_marker() for line in marked}) == len({line.get_color() for line in marked}) == len(marked)
    figure.draw_without_rendering()
    places = sorted(panel.transData.transform(point)[0] for line in marked for point in line.get_xydata())
    gaps = [72 / figure.dpi * (right - left) for left, right in itertools.pairwise(places)]
    assert min(gaps) > 3  # points; a marker is 5 to 9 wide
    legend = figure.legends[0] if figure.legends else figure.axes[-1].get_legend()
    assert len(legend.get_texts()) == len(COMPARED) + 1
    box = legend.get_window_extent()
    assert all(not box.overlaps(one.get_window_extent()) for one in figure.axes[: len(tasks)])
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1


def test_what_is_read_is_what_was_written(written):
    for recorded in (written[0], COMMITTED):
        for result, expected in zip(read(recorded), recorded["results"], strict=True):
            found = result_record(result)
            # Sums of floats are rounded in another way since Python 3.12.
            assert found["mean"] == pytest.approx(expected["mean"], rel=1e-15)
            assert {**found, "mean": None} == {**expected, "mean": None}


def test_records_about_the_same_questions_are_joined(tmp_path, capsys):
    names = ("compare.json", "compare_values.json", "compare_peers.json", "compare_ahead.json")
    files = [str(RESULTS / name) for name in names]
    compare.main(["--read", *files])
    rows = [line.split() for line in capsys.readouterr().out.split("decode attention recall")[0].splitlines()]
    assert [row[0] for row in rows if row[1:2] == ["64"]] == [name for name in ALL if name != "half-mass"]
    assert sum(row[:1] == ["full"] for row in rows) == 1
    assert joined([COMMITTED, COMMITTED]) == joined([COMMITTED])
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps({**COMMITTED, "settings": {**COMMITTED["settings"], "count": 7}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="--read: the files are not about the same questions: count is 140 and 7"):
        compare.main(["--read", files[0], str(fewer)])


def test_a_record_is_shown_without_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tiny_vlm.answering.load", None)
    compare.main(["--read", str(RESULTS / "compare.json"), "--plot", str(tmp_path / "plot.png")])
    results = read(COMMITTED)
    assert capsys.readouterr().out == f"{table(results)}\n\n{recall_table(results)}\n"
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "poem"], "'poem' (choose from"),
        (["--methods", "none"], "'none' (choose from"),
        (["--methods", "full"], "'full' (choose from"),
        (["--count", "0"], "--count: needs a whole number, at least 1, got '0'"),
        (["--budgets", "64", "0"], "--budgets: needs a whole number, at least 1, got '0'"),
        (["--budgets", "many"], "--budgets: needs a whole number, at least 1, got 'many'"),
        (["--batch-size", "-8"], "--batch-size: needs a whole number, at least 1, got '-8'"),
        (["--model", "nowhere"], "--model: no such folder: 'nowhere'"),
        (["--json", "nowhere/scores.json"], "--json: no such folder: 'nowhere'"),
        (["--device", "toaster"], "--device: cannot use 'toaster'"),
        (["--device", "cuda:99"], "--device: cannot use 'cuda:99'"),
        (["--plot", "plot.doc"], "--plot: 'plot.doc' has no ending that matplotlib can draw: "),
        (["--read", "nowhere.json"], "--read: no such file: 'nowhere.json'"),
        (
            ["--read", str(RESULTS / "decoding.json")],
            "decoding.json' is no JSON file of compare.py: KeyError('results')",
        ),
        (["--document-first", "--methods", "shiftkv", "kvzip"], "--document-first: not for kvzip"),
        (["--read", str(RESULTS / "compare.json"), "--json", "x.json"], "--json goes without --read"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err


def test_a_budget_that_a_method_cannot_keep_is_refused_before_anything_is_measured():
    with pytest.raises(SystemExit, match=r"streaming_llm: budget=4 must be at least 5: StreamingLLM\(sinks=4\)"):
        compare.main([*SMALL, "--methods", "keydiff", "streaming_llm", "--budgets", "64", "4"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "plot.png"], '--plot: needs matplotlib: pip install "mmshiftkv[plot]"'),
        ([], 'without --builtin-font-only needs matplotlib: pip install "mmshiftkv[plot]"'),
    ],
)
def test_missing_matplotlib_is_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err
