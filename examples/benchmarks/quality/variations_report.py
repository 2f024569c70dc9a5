"""How variations.py shows what it measured: a table, JSON, and the note in Markdown."""

import argparse
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from benchmarks import report
from tiny_vlm.pages import HELD_OUT_SEED

PUBLISHED = "published"
VALUE_AWARE = "value-aware"
TITLES = {
    PUBLISHED: "The published settings, and one change at a time",
    VALUE_AWARE: "The value-aware settings, and one change at a time",
}
READING = """\
Written by `variations.py --note`. Exact match in percent, averaged over the tasks, at each budget (tokens per layer and
KV head); beside it the difference to `{baseline}` in percentage points, paired question by question, with its 95 %
bootstrap interval. Every interval is for its row alone: among this many, some may leave out 0 by chance.
"""
ROWS = {
    PUBLISHED: """\
Rows named after a setting change that one. Those of `seed` differ from `published` in nothing but the noise of the
samples. Where `num_groups` changes, `future_stride`, which follows it by default, stays at 32. Those of the last query
are no settings of the library: they change how often the attention mass of the last prompt token's query enters that of
each group, or the score beside the votes; `last_query_share` gives so many of the places to the tokens with the most of
that mass, whatever their votes, and "last query alone" gives it all of them.""",
    VALUE_AWARE: """\
Rows named after a setting change that one; where `num_proxies` changes, a group keeps 16 proxies, and `future_stride`
stays at 32. Those of `seed` differ from `value-aware` in nothing but the noise of the samples. The others are no
settings of the library; `VariedValues` in varied_values.py says what they do.""",
}


def variations_file(text: str) -> dict[str, Any]:
    """An argparse type: what variations.py has written as JSON, by the path of the file."""
    return report.read_record(text, "variations.py", lambda run: note([run]))


def baseline_of(run: dict[str, Any]) -> str:
    """The preset that a run's variations are held against."""
    return run["settings"].get("baseline", PUBLISHED)


def difference(result: dict[str, Any], baseline: str) -> str:
    """The difference of a result to the baseline, with its interval, in points; "-" for the baseline itself."""
    if result["variation"] == baseline:
        return "-"
    mean, low, high = (100 * result["difference"][name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def note(recorded: Sequence[dict[str, Any]]) -> str:
    """Markdown: the conditions of each run, and a row for each variation, in the order of the first run.

    Rows are sorted by the exact match of the first run, averaged over its budgets; a variation that a run lacks has
    dashes there.

    Args:
        recorded: what variations.py writes as JSON, one run after the other.
    """
    baseline = baseline_of(recorded[0])
    columns = [(run, budget) for run in recorded for budget in run["settings"]["budgets"]]
    found = [{r["variation"]: r for r in run["results"] if r["budget"] == budget} for run, budget in columns]
    first = len(recorded[0]["settings"]["budgets"])

    def order(name: str) -> tuple[bool, float]:
        scores = [results[name]["exact_match"]["mean"] for results in found[:first] if name in results]
        return not scores, -sum(scores)

    names = sorted(dict.fromkeys(name for results in found for name in results), key=order)
    head = ["variation", *(cell for run, budget in columns for cell in (f"{_set(run)}, {budget}", "difference"))]
    lines = []
    for name in names:
        cells = [name]
        for results in found:
            result = results.get(name)
            cells += (
                [f"{100 * result['exact_match']['mean']:.1f}", difference(result, baseline)] if result else ["-", "-"]
            )
        lines.append(cells)
    return "\n".join(
        [
            f"# {TITLES[baseline]}",
            "",
            READING.format(baseline=baseline),
            ROWS[baseline],
            "",
            *(f"- {_conditions(run)}" for run in recorded),
            "",
            report.table(head, lines, left=["variation"], markdown=True),
            "",
        ]
    )


def _set(run: dict[str, Any]) -> str:
    return "test" if run["settings"]["seed"] == HELD_OUT_SEED else "development"


def _conditions(run: dict[str, Any]) -> str:
    settings, environment = run["settings"], run["environment"]
    return (
        f"{_set(run)}: documents of seed {settings['seed']}, {settings['count']} questions a task "
        f"({', '.join(settings['tasks'])}), batches of {settings['batch_size']}; {settings['model']}, "
        f"{settings['dtype']}, {environment['device']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}"
    )


def record(results: list[dict[str, Any]], model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that a reader of the numbers needs to repeat them, ready for JSON."""
    names = ("baseline", "budgets", "tasks", "count", "batch_size", "seed", "builtin_font_only")
    return {
        "settings": {
            "model": arguments.model.resolve().name,
            **{name: getattr(arguments, name) for name in names},
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "environment": report.environment(model.device),
        "results": results,
    }


def table(recorded: dict[str, Any]) -> str:
    """Exact match in percent, the best variation first; a block of lines for each budget."""
    tasks, baseline = recorded["settings"]["tasks"], baseline_of(recorded)
    blocks = []
    for budget, results in groupby(recorded["results"], key=lambda result: result["budget"]):
        block = []
        for result in results:
            shares = [result["tasks"][task]["exact_match"] for task in tasks] + [result["exact_match"]["mean"]]
            percents = [f"{100 * share:.1f}" for share in shares]
            block.append([str(budget), result["variation"], *percents, difference(result, baseline)])
        blocks.append(block)
    head = f"exact match, percent ({recorded['settings']['count']} questions a task); difference to {baseline}"
    return "\n".join([head, report.table(["budget", "variation", *tasks, "mean", "difference"], *blocks)])
