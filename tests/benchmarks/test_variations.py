import json
import re
from pathlib import Path

import pytest

from benchmarks.quality import variations
from benchmarks.quality.questions import DEVELOPMENT_SEED
from benchmarks.quality.variation import Variation, variations_of
from benchmarks.quality.variations_report import TITLES, note
from benchmarks.quality.varied_values import VariedValues
from mmshiftkv import PrefillSelectionCache, ShiftKVConfig
from mmshiftkv.methods.shiftkv import ShiftKV
from tiny_vlm.answering import answer, build_inputs
from tiny_vlm.pages import HELD_OUT_SEED, held_out_examples

RESULTS = Path(variations.__file__).parents[1] / "results"
TEST_RECORD = str(RESULTS / "variations_test.json")
RECORDS = {"published": "variations", "value-aware": "value_variations"}
SMALL = ["--count", "2", "--batch-size", "2", "--device", "cpu", "--tasks", "lookup", "--budgets", "48", "8"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What one run of the script writes: the JSON file, and the note."""
    folder = tmp_path_factory.mktemp("variations")
    files = folder / "run.json", folder / "note.md"
    options = ["--only", "gamma=1.0", "last query alone", "last query not in the score"]
    variations.main([*SMALL, *options, "--json", str(files[0]), "--note", str(files[1])])
    return files


@pytest.mark.parametrize("baseline", TITLES)
def test_names_and_settings_are_distinct_and_every_one_makes_a_cache(baseline, tiny):
    every = variations_of(baseline)
    assert len({one.name for one in every}) == len({repr((one.preset, one.changes)) for one in every}) == len(every)
    assert every[0] == Variation(baseline, preset=baseline)
    for one in every:
        one.make_cache(tiny[0], 64)


def test_the_documents_are_not_those_of_the_test_set():
    assert variations.parse_arguments([]).seed == DEVELOPMENT_SEED != HELD_OUT_SEED


def test_json_holds_every_result_and_its_difference(written):
    run = json.loads(written[0].read_text(encoding="utf-8"))
    assert run["settings"]["seed"] == DEVELOPMENT_SEED
    assert [result["budget"] for result in run["results"]] == [48] * 4 + [8] * 4
    for budget in (48, 8):
        results = [result for result in run["results"] if result["budget"] == budget]
        (published,) = (result for result in results if result["variation"] == "published")
        assert published["difference"] == {"mean": 0, "low": 0, "high": 0}
        means = [result["exact_match"]["mean"] for result in results]
        assert means == sorted(means, reverse=True)
        for result in results:
            gain = result["exact_match"]["mean"] - published["exact_match"]["mean"]
            assert result["difference"]["mean"] == pytest.approx(gain)
            assert result["tasks"]["lookup"]["exact_match"] == result["exact_match"]["mean"]


def test_the_note_has_a_row_for_each_variation_and_columns_for_each_run(written, tmp_path):
    run = json.loads(written[0].read_text(encoding="utf-8"))
    single = written[1].read_text(encoding="utf-8")
    assert single == note([run])
    test_run = {**run, "settings": {**run["settings"], "seed": HELD_OUT_SEED}}
    test_run["results"] = [result for result in run["results"] if result["variation"] in ("published", "gamma=1.0")]
    (tmp_path / "test.json").write_text(json.dumps(test_run), encoding="utf-8")
    variations.main(["--from", str(written[0]), str(tmp_path / "test.json"), "--note", str(tmp_path / "both.md")])
    both = (tmp_path / "both.md").read_text(encoding="utf-8")
    head, _, *rows = [re.split(r" +\| +", line.strip("| ")) for line in both.splitlines() if line.startswith("|")]
    assert head[1::2] == ["development, 48", "development, 8", "test, 48", "test, 8"]
    assert {row[0]: row[5] == "-" for row in rows} == {
        "published": False,
        "gamma=1.0": False,
        "last query alone": True,
        "last query not in the score": True,
    }
    assert all(len(row) == 9 for row in rows)
    assert f"seed {HELD_OUT_SEED}, 2 questions a task (lookup)" in both


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "gama=1"], "invalid choice: 'gama=1'"),
        (["--baseline", "value-aware", "--only", "mass=0.5"], "invalid choice: 'mass=0.5'"),
        (["--from", "nowhere.json", "--note", "note.md"], "--from: no such file: 'nowhere.json'"),
        (
            ["--from", str(RESULTS / "compare.json"), "--note", "note.md"],
            "compare.json' is no JSON file of variations.py",
        ),
        (
            ["--from", str(RESULTS / "variations_test.json"), "--note", "x.md", "--json", "x.json"],
            "--json goes without",
        ),
        (["--count", "0"], "needs a whole number, at least 1"),
        (["--json", "nowhere/run.json"], "no such folder"),
    ],
)
def test_wrong_arguments_are_named(options, words, capsys):
    with pytest.raises(SystemExit):
        variations.main(options)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("baseline", TITLES)
def test_the_note_of_this_repository_is_that_of_its_records(baseline, tmp_path):
    files = [str(RESULTS / f"{RECORDS[baseline]}_{name}.json") for name in ("development", "test")]
    variations.main(["--from", *files, "--note", str(tmp_path / "note.md")])
    recorded = (RESULTS / f"{RECORDS[baseline]}.md").read_text(encoding="utf-8")
    assert (tmp_path / "note.md").read_text(encoding="utf-8") == recorded


@pytest.mark.parametrize("baseline", TITLES)
def test_the_records_of_this_repository_have_the_variations_of_the_script(baseline):
    recorded = json.loads((RESULTS / f"{RECORDS[baseline]}_development.json").read_text(encoding="utf-8"))
    settings = {one.name: one.changes for one in variations_of(baseline)}
    assert {result["variation"]: result["settings"] for result in recorded["results"]} == settings


def test_runs_without_a_note_are_refused(written, capsys):
    with pytest.raises(SystemExit):
        variations.main(["--from", str(written[0])])
    assert "--from needs --note" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["value-aware", "mass averaged over groups, votes", "refit to the last 8 tokens"])
def test_value_aware_settings_are_varied_in_plain_torch(name, tiny, tmp_path):
    options = ["--baseline", "value-aware", "--only", name, "--json", str(tmp_path / "run.json")]
    variations.main([*SMALL, *options, "--note", str(tmp_path / "note.md")])
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["baseline"] == "value-aware"
    assert {result["variation"] for result in run["results"]} == {"value-aware", name}
    assert "difference to `value-aware`" in (tmp_path / "note.md").read_text(encoding="utf-8")


def test_nothing_varied_is_the_library_s_own_score(tiny):
    model, processor = tiny
    example = next(iter(held_out_examples(1, seed=3)))
    inputs = build_inputs(processor, [example.image], [example.question])
    config = ShiftKVConfig.for_model(model, budget=40, preset="value-aware")
    caches = [PrefillSelectionCache(model, method(config), 40) for method in (ShiftKV, VariedValues)]
    for cache in caches:
        answer(model, processor, inputs, cache, 1)
    for layer in range(len(caches[0].layers)):
        kept, varied = (cache.kept_indices(layer) for cache in caches)
        assert (kept[..., None] == varied[..., None, :]).any(-1).float().mean() >= 0.98  # ties
