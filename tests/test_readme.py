"""What the README says is what the repository does."""

import json
import re
from pathlib import Path

import torch

from mmshiftkv.report import format_bytes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
BASH = re.findall(r"```bash\n(.*?)```", README, re.S)


def test_ci_runs_the_command_that_the_readme_gives():
    (command,) = [block.strip() for block in BASH if "pytest" in block]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_files_that_are_linked_exist():
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (ROOT / target).exists(), target


def test_the_snippets_run(vision_case, capsys):
    case = vision_case("qwen2_5_vl")
    inputs = case.prompts()
    names = {"model": case.model, "inputs": inputs, "processor": case.processor, "torch": torch}
    for snippet in PYTHON:
        exec(compile(snippet, "README.md", "exec"), names)
    assert "stored" in capsys.readouterr().out
    prompt = inputs["input_ids"].shape[1]
    assert names["cache"].kept_indices(0).shape[-1] == 64
    assert names["answer"].shape[1] > names["conversation"].shape[1] > prompt
    assert names["answer"][:, :prompt].equal(inputs["input_ids"])


def test_the_results_are_those_on_record():
    recorded = json.loads((ROOT / "examples" / "benchmarks" / "results" / "compare.json").read_text(encoding="utf-8"))
    by_name = {
        (result["method"].replace("_", ""), str(result["budget"] or "-")): result for result in recorded["results"]
    }
    rows = re.findall(
        r"^\| (full|ShiftKV|ExpectedAttention|SnapKV|KeyDiff|StreamingLLM|Random) \| (\S+) \| (.*) \|$", README, re.M
    )
    assert len(rows) == len(recorded["results"]) == 25
    for method, budget, cells in rows:
        result = by_name[method.lower(), budget]
        for cell, task in zip(cells.split(" | "), result["tasks"].values(), strict=True):
            exact, anls = (100 * task[name]["mean"] for name in ("exact_match", "anls"))
            assert cell == f"{exact:.1f} / {anls:.1f}"
        assert {task["count"] for task in result["tasks"].values()} == {140}


def test_the_costs_are_those_on_record():
    recorded = json.loads((ROOT / "examples" / "benchmarks" / "results" / "selection.json").read_text(encoding="utf-8"))
    for tokens in recorded["settings"]["lengths"]:
        (selection,) = (row for row in recorded["selection"] if (row["batch"], row["tokens"]) == (1, tokens))
        full, shiftkv = (row for row in recorded["prefill"] if row["tokens"] == tokens)
        (row,) = re.findall(rf"^\| {tokens:,} \| (.*) \|$", README, re.M)
        assert row.split(" | ") == [
            f"{selection['selection']:.3f} ms",
            f"{selection['materialized']:.3f} ms",
            f"{selection['floor_products']:.3f} ms",
            f"{selection['extra_memory']:.0f} ({selection['materialized_memory']:.0f}) MiB",
            f"{1e3 * full['seconds']:.1f} ms",
            f"{1e3 * shiftkv['seconds']:.1f} ms (x {shiftkv['seconds'] / full['seconds']:.3f})",
            f"{shiftkv['peak'] / 2**20:.0f} instead of {full['peak'] / 2**20:.0f} MiB",
        ]


def test_the_times_per_token_are_those_on_record():
    results = ROOT / "examples" / "benchmarks" / "results"
    one, eight = (
        json.loads((results / name).read_text(encoding="utf-8")) for name in ("decoding.json", "decoding_batch_8.json")
    )
    for settings in (one["settings"], eight["settings"]):
        (batch,) = settings["batches"]
        lengths = " ".join(map(str, settings["lengths"]))
        assert f"--lengths {lengths} --batches {batch} --new-tokens {settings['new_tokens']} --repeats 2" in README
        assert settings["repeats"] == 2
    for name in {row["cache"] for row in one["rows"]}:
        (found,) = re.findall(rf"^\| {name} \| (.*) \|$", README, re.M)
        rows = [row for record in (one, eight) for row in record["rows"] if row["cache"] == name]
        assert found.split(" | ") == [rows[0]["decoding"], *map(decoding_cell, rows)]


def decoding_cell(row):
    cell = f"{row['milliseconds']:.2f} ms, {format_bytes(row['cache_bytes'])}"
    return f"{cell}, {row['tokens_per_second']:,.0f} tokens/s" if row["batch"] > 1 else cell


def test_the_settings_are_all_there():
    from dataclasses import fields

    from mmshiftkv import ShiftKVConfig

    table = README[README.index("| field | default |") : README.index("`cache.kept_indices(layer)`")]
    assert {field.name for field in fields(ShiftKVConfig)} <= set(re.findall(r"`(\w+)`", table))
    for field in fields(ShiftKVConfig):
        row = next(line for line in table.splitlines() if f"`{field.name}`" in line.split("|")[1])
        if isinstance(field.default, float):
            assert f" {field.default:g}" in row
