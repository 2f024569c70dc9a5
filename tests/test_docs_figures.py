"""The figures and settings in the documents are those on record."""

import ast
import itertools
import json
import re
from dataclasses import fields
from pathlib import Path

from documents import (
    README,
    RESULTS,
    TEXTS,
    record,
    table,
)
from mmshiftkv import METHODS, ShiftKVConfig, make_cache
from mmshiftkv.methods.config import FAMILY_SETTINGS
from mmshiftkv.report import format_bytes

FAMILIES = Path(__file__).parent / "families" / "record.json"
CACHES = {
    "full": "full",
    "ShiftKV, value-aware": "value-aware",
    "ShiftKV": "shiftkv",
    "ExpectedAttention": "expected_attention",
    "SnapKV": "snapkv",
    "KeyDiff": "keydiff",
    "StreamingLLM": "streaming_llm",
    "Random": "random",
    "SnapKV, values": "snapkv_values",
    "CriticalKV": "criticalkv",
    "DropKV": "dropkv",
    "Last query, values": "last_query_values",
    "KVzip": "kvzip",
    "Full cache's attention (limit)": "full_attention",
}
SECOND = {
    **CACHES,
    "ShiftKV, Qwen settings": "qwen-settings",
    "ShiftKV, value-aware, Qwen settings": "value-aware-qwen",
}
QUALITY = ("compare.json", "compare_values.json")
PEERS = ("compare_peers.json", "compare_ahead.json")
# What the README's table shows, at these budgets.
SHOWN = ("ShiftKV, value-aware", "ShiftKV", "ExpectedAttention", "SnapKV")
SHOWN_BUDGETS = ("128", "64", "32")


def recorded_tasks(files):
    """The tasks of each recorded (name, budget), as tables write them."""
    names = {method: name for name, method in CACHES.items()}
    return {
        (names[result["method"]], str(result["budget"] or "-")): list(result["tasks"].values())
        for file in files
        for result in record(file)["results"]
    }


def percent(task, *measures):
    return " / ".join(f"{100 * task[measure]['mean']:.1f}" for measure in measures)


def test_the_quality_figures_are_those_on_record():
    recorded = recorded_tasks(QUALITY)
    assert {task["count"] for tasks in recorded.values() for task in tasks} == {140}
    rows = table(README, "| cache | budget | lookup |")
    assert {tuple(row[:2]) for row in rows} == {("full", "-"), *itertools.product(SHOWN, SHOWN_BUDGETS)}
    for name, budget, *cells in rows:
        assert cells == [percent(task, "exact_match") for task in recorded[name, budget]]
    both, recalls = results_tables()
    assert {tuple(row[:2]) for row in both} == set(recorded)
    assert {tuple(row[:2]) for row in recalls} == {key for key in recorded if key[1] != "-"}
    for name, budget, *cells in both:
        assert cells == [percent(task, "exact_match", "anls") for task in recorded[name, budget]]
    for name, budget, *cells in recalls:
        assert cells == [percent(task, "decode_attention_recall") for task in recorded[name, budget]]


def test_the_figures_of_documents_that_come_first_are_those_on_record():
    after = recorded_tasks(["compare_document_first.json"])
    before = {key: tasks for key, tasks in recorded_tasks(QUALITY).items() if key in after}
    assert {task["count"] for tasks in after.values() for task in tasks} == {140}
    assert record("compare_document_first.json")["settings"]["document_first"]
    rows = table("docs/results.md", "| before / after | budget |")
    assert {tuple(row[:2]) for row in rows} == set(before) == set(after)
    for name, budget, *cells in rows:
        pairs = zip(before[name, budget], after[name, budget], strict=True)
        assert cells == [" / ".join(percent(task, "exact_match") for task in pair) for pair in pairs]


def test_the_figures_of_a_step_are_those_on_record():
    rows = table("docs/performance.md", "| budget | rows | a token |")
    steps = record("step_h200.json")["steps"]
    assert len(steps) == len(rows)
    for step, (budget, rows_together, token, *kernels) in zip(steps, rows, strict=True):
        (milliseconds,) = step["milliseconds"].values()
        expected = [str(step["budget"]), str(step["batch"]), f"{milliseconds:.2f} ms"]
        assert [budget, rows_together, token] == expected
        spent = sum(kernel["microseconds"] for kernel in step["kernels"])
        assert abs(sum(int(part) for part in kernels if part != "-") - spent) < 5


def test_the_figures_of_starts_are_those_on_record():
    recorded = record("starts.json")
    (start,), (prompts,) = recorded["cold_starts"], recorded["prompts"]
    text = " ".join(TEXTS["docs/performance.md"].split())
    assert f"a prompt of {start['tokens']:,} tokens" in text
    assert f"{start['second_token']:.1f} s, of which the first token took {start['first_token']:.1f}" in text
    assert f"after {start['again']:.2f} s" in text
    assert (len(prompts["tokens"]), prompts["compiled_later"], sum(prompts["kernels"])) == (200, 0, 0)
    assert f"{start['second_token']:.0f} with `decode_ahead`" in TEXTS[README]


def test_the_figures_of_the_second_model_are_those_on_record():
    recorded = {(one["method"], str(one["budget"] or "-")): one for one in record("compare_llava.json")["results"]}
    rows = table("docs/results.md", "| second model | budget |")
    assert [(SECOND[name], budget) for name, budget, *_ in rows if SECOND[name] == "full"] == [("full", "-")]
    assert {(SECOND[name], budget) for name, budget, *_ in rows} == set(recorded)
    for name, budget, *cells in rows:
        one = recorded[SECOND[name], budget]
        means = (f"{100 * one['mean'][measure]:.1f}" for measure in ("exact_match", "decode_attention_recall"))
        assert cells == [*(percent(task, "exact_match", "anls") for task in one["tasks"].values()), *means]


def test_the_most_attended_tokens_are_those_on_record():
    rows = table("docs/results.md", "| most attended token (%) |")
    for name, (_, *cells) in zip(("sinks.json", "sinks_llava.json"), rows, strict=True):
        layers = record(name)["layers"]
        assert cells == [f"{100 * layer['mean']:.1f}" for layer in layers]
        assert not any("(first)" in token for layer in layers for token in layer["tokens"])


def test_the_figures_of_peers_are_those_on_record():
    recorded = recorded_tasks(PEERS)
    assert {task["count"] for tasks in recorded.values() for task in tasks} == {140}
    rows = table("docs/results.md", "| peer | budget |")
    assert {tuple(row[:2]) for row in rows} == set(recorded)
    for name, budget, *cells in rows:
        assert cells == [percent(task, "exact_match") for task in recorded[name, budget]]


def results_tables():
    text = TEXTS["docs/results.md"]
    found = re.findall(r"^\| cache \| budget \|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.M)
    return [[line.strip("| ").split(" | ") for line in rows.splitlines()] for rows in found]


def decoding_rows():
    one, eight = record("decoding.json"), record("decoding_batch_8.json")
    rows = [*one["rows"], *eight["rows"]]
    return one, eight, {name: [row for row in rows if row["cache"] == name] for name in (row["cache"] for row in rows)}


def decoding_cell(row):
    cell = f"{row['milliseconds']:.2f} ms, {format_bytes(row['cache_bytes'])}"
    return f"{cell}, {row['tokens_per_second']:,.0f} tokens/s" if row["batch"] > 1 else cell


def test_the_times_per_token_are_those_on_record():
    one, eight, by_name = decoding_rows()
    for settings in (one["settings"], eight["settings"]):
        (batch,) = settings["batches"]
        lengths = " ".join(map(str, settings["lengths"]))
        command = f"--lengths {lengths} --batches {batch} --new-tokens {settings['new_tokens']} --repeats 2"
        assert command in TEXTS["docs/performance.md"]
        assert settings["repeats"] == 2
    rows = table("docs/performance.md", "| cache | decoding | 2,048 prompt tokens |")
    assert {row[0] for row in rows} == set(by_name)
    for name, decoding, *cells in rows:
        assert [decoding, *cells] == [by_name[name][0]["decoding"], *map(decoding_cell, by_name[name])]
    rows = table(README, "| cache | decoding | 2,048 prompt tokens |")
    assert {row[0] for row in rows} == set(by_name)
    for name, *cells in rows:
        found = by_name[name]
        times = [f"{row['milliseconds']:.2f} ms" for row in found if row["batch"] == 1]
        held = next(format_bytes(row["cache_bytes"]) for row in found if row["tokens"] == 32768)
        (together,) = (row["tokens_per_second"] for row in found if (row["batch"], row["tokens"]) == (8, 8192))
        assert cells == [found[0]["decoding"], *times, held, f"{together:,.0f} tokens/s"]


def test_the_figures_of_large_batches_are_those_on_record():
    recorded = record("decoding_batch_32_64.json")
    settings = recorded["settings"]
    batches = " ".join(map(str, settings["batches"]))
    command = f"--lengths 2048 --batches {batches} --budgets 64 --new-tokens {settings['new_tokens']} --repeats 2"
    assert command in TEXTS["docs/performance.md"]
    assert (settings["lengths"], settings["budgets"], settings["repeats"]) == ([2048], [64], 2)
    for cells, row in zip(
        table("docs/performance.md", "| batch | cache | decoding | a token | tokens/s | cache holds | peak of"),
        recorded["rows"],
        strict=True,
    ):
        assert cells[:3] == [str(row["batch"]), row["cache"], row["decoding"]]
        figures = [f"{row['milliseconds']:.2f} ms", f"{row['tokens_per_second']:,.0f}"]
        assert cells[3:] == figures + [f"{row[name] / 2**20:,.0f} MiB" for name in ("cache_bytes", "peak_bytes")]


def selection_rows():
    """Of each recorded method and budget, its rows by length, for a batch of one."""
    recorded = record("selection.json")
    lengths = recorded["settings"]["lengths"]
    found = {(row["method"], row["budget"], row["tokens"]): row for row in recorded["selection"] if row["batch"] == 1}
    return lengths, {key[:2]: [found[*key[:2], tokens] for tokens in lengths] for key in found}


def test_the_costs_of_a_selection_are_those_on_record():
    lengths, recorded = selection_rows()
    head = " | ".join(f"{tokens:,} prompt tokens" if tokens == lengths[0] else f"{tokens:,}" for tokens in lengths)
    rows = table("docs/performance.md", f"| selection | budget | launches | {head} |")
    assert {(row[0], int(row[1])) for row in rows} == {*recorded, ("as published, N x T in memory", 64)}
    for name, budget, launches, *cells in rows:
        if (name, int(budget)) not in recorded:
            published = recorded["published", 64]
            assert cells == [f"{row['materialized']:.3f} ms, {row['materialized_memory']:.0f} MiB" for row in published]
            continue
        measured = recorded[name, int(budget)]
        assert {row["launches"] for row in measured} == {int(launches)}
        assert cells == [f"{row['selection']:.3f} ms, {row['extra_memory']:.0f} MiB" for row in measured]


def test_the_costs_of_a_prefill_are_those_on_record():
    recorded = record("selection.json")
    rows = table("docs/performance.md", "| prefill | 2,048 prompt tokens |")
    by_cache = {}
    for found in recorded["prefill"]:
        by_cache.setdefault(found["cache"], []).append(found)
    full = by_cache["DynamicCache"]
    assert [row[0] for row in rows] == list(by_cache)
    for name, *cells in rows:
        assert cells == [
            f"{1e3 * mine['seconds']:.1f} ms (x {mine['seconds'] / its['seconds']:.3f}), {mine['peak'] / 2**20:.0f} MiB"
            for mine, its in zip(by_cache[name], full, strict=True)
        ]
    flat = " ".join(TEXTS[README].split())
    for cache in ("ShiftKVCache 64", "ShiftKVCache 64, value-aware"):
        longer = [100 * mine["seconds"] / its["seconds"] - 100 for mine, its in zip(by_cache[cache], full, strict=True)]
        assert f"{longer[-1]:.1f} % (32,768 tokens) to {longer[0]:.1f} % (2,048)" in flat


def test_the_gains_of_presets_are_those_on_record():
    written = (RESULTS / "value_variations.md").read_text(encoding="utf-8").splitlines()
    recorded = [re.split(r" +\| +", line.strip("| ")) for line in written if line.startswith("|")]
    rows = table("docs/settings.md", "| variation | development, 64 |")
    assert [row[0] for row in rows[:3]] == ["value-aware", "no refit", "published"]
    assert all(row in recorded for row in rows)
    assert f"| {' | '.join(recorded[0])} |" in TEXTS["docs/settings.md"]


def test_the_settings_are_all_there():
    rows = {name.strip("`"): default for name, default, _ in table("docs/settings.md", "| field | default |")}
    assert list(rows) == [field.name for field in fields(ShiftKVConfig)]
    for field in fields(ShiftKVConfig):
        default, _, llava = rows[field.name].partition(" (LLaVA: ")
        if field.name != "budget":
            shown = f'"{field.default}"' if isinstance(field.default, str) else field.default
            assert default == (f"{shown:g}" if isinstance(shown, float) else str(shown))
        assert llava.rstrip(")") == str(FAMILY_SETTINGS["llava_next"].get(field.name, ""))


def test_the_other_methods_take_the_settings_that_they_are_said_to(vision_case):
    model = vision_case("qwen2_5_vl").model
    rows = table("docs/settings.md", "| cache | name in `make_cache` |")
    assert {name.strip('"') for _, name, _ in rows} == set(METHODS)
    for kind, name, settings in rows:
        given = {key: ast.literal_eval(value) for key, value in re.findall(r"`(\w+)=([^`]+)`", settings)}
        cache, plain = (make_cache(name.strip('"'), model, 64, **keywords) for keywords in (given, {}))
        assert type(cache).__name__ in kind
        assert getattr(cache, "_method", None) == getattr(plain, "_method", None)  # they are the defaults


def test_the_figures_of_joined_prompts_are_those_on_record():
    rows = table("docs/performance.md", "| batch | cache | decoding | a token | tokens per second |")
    recorded = record("joined.json")["rows"]
    assert {row["batch"] for row in recorded} == {1, 8, 32, 64}
    assert {row["tokens"] for row in recorded} == {8192}
    for cells, row in zip(rows, recorded, strict=True):
        assert cells[:3] == [str(row["batch"]), row["cache"], row["decoding"]]
        if row["error"]:
            assert cells[3:] == [row["error"], "-", "-", "-"]
            continue
        figures = [f"{row['milliseconds']:.2f} ms", f"{row['tokens_per_second']:,.0f}"]
        assert cells[3:] == figures + [f"{row[name] / 2**20:,.0f} MiB" for name in ("cache_bytes", "peak_bytes")]


def test_the_readme_counts_the_families_that_work():
    outcomes = [family["outcome"] for family in json.loads(FAMILIES.read_text())["families"].values()]
    counted = [outcome for outcome in outcomes if outcome in ("works", "refused", "faulty")]
    assert f"{counted.count('works')} of {len(counted)} families" in TEXTS["README.md"]
