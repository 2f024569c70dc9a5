"""Measure what each setting of MM-ShiftKV is worth: the published settings, and the same with one thing changed.

    python variations.py --json development.json --note variations.md
    python variations.py --seed 20240317 --json test.json
    python variations.py --from development.json test.json --note variations.md

Every variation answers the same questions about generated documents, by default none of those that compare.py asks
about: settings are chosen on these, and only then looked at on the others (`--seed 20240317`). Exact match is averaged
over the tasks. Its difference to the published settings is paired, question by question, with a 95 % bootstrap
interval. The JSON file has the settings, the versions and all figures, its scores being fractions 0..1; `--note` writes
one Markdown table from it, or with `--from` from files of earlier runs, in the order of the first of them.
"""

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.quality.compare import DEFAULT_MODEL, NEED_MATPLOTLIB, batches
from benchmarks.quality.comparison import device_name
from benchmarks.quality.scoring import anls, estimate, exact_match
from benchmarks.quality.variations_note import PUBLISHED, difference, note, read_run
from common import DTYPES, choose_device, output_file, positive_integer
from mmshiftkv import PrefillSelectionCache, ShiftKVConfig
from mmshiftkv.methods.shiftkv import ShiftKV
from shiftkv_kernels import vote
from tiny_vlm.answering import MAX_NEW_TOKENS, answer, build_inputs, existing_folder, load
from tiny_vlm.pages import ALL_FONTS, BUILTIN_FONTS, HELD_OUT_SEED, TASKS, held_out_of_task

DEVELOPMENT_SEED = HELD_OUT_SEED + 2  # calibrate.py has the one between


@dataclass(frozen=True)
class WeightedLastQuery(ShiftKV):
    """ShiftKV whose real last query counts more or less than once.

    Attributes:
        in_groups: how often its attention mass enters that of each group, before the groups vote; published: 1.
        in_score: how often it enters the score beside the votes; published: 1.
    """

    in_groups: float = 1.0
    in_score: float = 1.0

    def score(self, layer: Any, summary: Any, keys: Any, values: Any, valid: Any) -> torch.Tensor:
        """Scores (B, H_kv, T), as `Policy.score` says."""
        mass, last_mass = self.attention_mass(layer, summary, keys, valid)
        proxies = self.config.num_proxies // self.config.num_groups
        # `mass` is (that of the proxies + that of the last query) / (1 + proxies), whose scale does not matter to a
        # vote; without the last query, rounding may leave a little less than nothing.
        mass = mass + (self.in_groups - 1) / (1 + proxies) * last_mass.unsqueeze(2)
        return vote(mass.clamp(min=0), self.config.mass) + self.in_score * last_mass


@dataclass(frozen=True)
class Variation:
    """The published settings with something changed: settings of the config, or weights of `WeightedLastQuery`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def make_cache(self, model: Any, budget: int) -> PrefillSelectionCache:
        """A new cache for one `generate` call."""
        config = ShiftKVConfig.for_model(model, budget=budget, **self.settings)
        policy = WeightedLastQuery(config, **self.weights) if self.weights else ShiftKV(config)
        return PrefillSelectionCache(model, policy, budget)


def _of(setting: str, values: Sequence[Any], **fixed: Any) -> list[Variation]:
    return [Variation(f"{setting}={value}", {setting: value, **fixed}) for value in values]


def all_variations() -> list[Variation]:
    """The published settings first, then one change at a time.

    Other seeds change nothing but the noise: they show how much a difference may come from the samples alone.  The
    stride stays at 32 where the groups, which it follows by default, become more or fewer.
    """
    return [
        Variation(PUBLISHED),
        *_of("seed", [1, 2]),
        *_of("gamma", [0.5, 1.0, 2.0, 5.0, 20.0, 30.0]),
        *_of("num_proxies", [128, 2048]),
        *_of("num_groups", [8, 16, 64, 128], future_stride=32),
        *_of("mass", [0.5, 0.8, 0.9, 0.99]),
        *_of("stats_window", [32, 128]),
        *_of("future_stride", [1, 8]),
        *_of("last_token_layers", [2]),
        *_of("last_query_share", [0.125, 0.25, 0.5, 0.75]),
        # All places but that of the last token: what its attention chooses without any votes.
        Variation("last query alone", {"last_query_share": 0.99}),
        Variation("last query not in the groups", weights={"in_groups": 0.0}),
        Variation("last query 16 times in the groups", weights={"in_groups": 16.0}),
        Variation("last query not in the score", weights={"in_score": 0.0}),
        Variation("last query 8 times in the score", weights={"in_score": 8.0}),
        Variation("last query 32 times in the score", weights={"in_score": 32.0}),
    ]


Scores = dict[tuple[str, int], dict[str, list[tuple[float, float]]]]  # exact match and ANLS of each answer, by task


def measure(model: Any, processor: Any, variations: Sequence[Variation], arguments: argparse.Namespace) -> Scores:
    """Has every variation answer the same questions at every budget, with a progress bar."""
    fonts = BUILTIN_FONTS if arguments.builtin_font_only else ALL_FONTS
    setups = [(variation, budget) for variation in variations for budget in arguments.budgets]
    scores: Scores = {(variation.name, budget): {task: [] for task in arguments.tasks} for variation, budget in setups}
    with tqdm(total=len(arguments.tasks) * arguments.count * len(setups), unit="answer") as progress:
        for task in arguments.tasks:
            for batch in batches(held_out_of_task(task, arguments.count, arguments.seed, fonts), arguments.batch_size):
                images, questions = [example.image for example in batch], [example.question for example in batch]
                inputs = build_inputs(processor, images, questions).to(model.device, model.dtype)
                for variation, budget in setups:
                    progress.set_description(f"{task}, {variation.name}, {budget}")
                    cache = variation.make_cache(model, budget)
                    texts = answer(model, processor, inputs, cache, MAX_NEW_TOKENS[task])
                    scores[variation.name, budget][task].extend(
                        (float(exact_match(text, example.answer)), anls(text, example.answer))
                        for text, example in zip(texts, batch, strict=True)
                    )
                    progress.update(len(batch))
    return scores


def by_question(scores: Scores, name: str, budget: int) -> np.ndarray:
    """Exact match of the n-th question of each task, averaged over the tasks: (count,) fractions.

    The n-th questions of all tasks are about pages of one size, so they are drawn together in a bootstrap.
    """
    tasks = scores[name, budget].values()
    return np.mean([[exact for exact, _ in answers] for answers in tasks], axis=0)


def summarized(scores: Scores, variations: Sequence[Variation], budget: int) -> list[dict[str, Any]]:
    """The figures of each variation at one budget, best mean exact match first."""
    baseline = by_question(scores, PUBLISHED, budget)
    results = []
    for variation in variations:
        exact = by_question(scores, variation.name, budget)
        by_task = scores[variation.name, budget]
        results.append(
            {
                "variation": variation.name,
                "budget": budget,
                "settings": {**variation.settings, **variation.weights},
                "exact_match": asdict(estimate(exact.tolist())),
                "difference": asdict(estimate((exact - baseline).tolist())),
                "tasks": {
                    task: dict(zip(("exact_match", "anls"), np.mean(answers, axis=0).tolist(), strict=True))
                    for task, answers in by_task.items()
                },
            }
        )
    return sorted(results, key=lambda result: -result["exact_match"]["mean"])


def record(results: list[dict[str, Any]], model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that a reader of the numbers needs to repeat them, ready for JSON."""
    names = ("budgets", "tasks", "count", "batch_size", "seed", "builtin_font_only")
    return {
        "settings": {
            "model": arguments.model.resolve().name,
            **{name: getattr(arguments, name) for name in names},
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": device_name(model.device),
        },
        "results": results,
    }


def table(recorded: dict[str, Any]) -> str:
    """Exact match in percent, the best variation first; a block of lines for each budget."""
    tasks = recorded["settings"]["tasks"]
    cells = [["budget", "variation", *tasks, "mean", "difference"]]
    for result in recorded["results"]:
        shares = [result["tasks"][task]["exact_match"] for task in tasks] + [result["exact_match"]["mean"]]
        percents = [f"{100 * share:.1f}" for share in shares]
        cells.append([str(result["budget"]), result["variation"], *percents, difference(result)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines: list[str] = []
    for row, before in zip(cells, [cells[0], *cells], strict=False):
        if lines and row[0] != before[0]:
            lines.append("")
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    head = f"exact match, percent ({recorded['settings']['count']} questions a task); difference to {PUBLISHED}"
    return "\n".join([head, *lines])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments, each budget, task and variation once; exits with a message when they are wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [variation.name for variation in all_variations()]
    add = parser.add_argument
    add("--model", type=existing_folder, default=DEFAULT_MODEL, help="folder of the model and its processor")
    add("--only", nargs="+", choices=names, default=names, metavar="VARIATION", help=f"besides {PUBLISHED!r}")
    add("--budgets", nargs="+", type=positive_integer, default=[64, 32], help="tokens per layer and KV head")
    add("--tasks", nargs="+", choices=TASKS, default=["lookup", "multi", "line"], help="kinds of questions")
    add("--count", type=positive_integer, default=100, help="questions of each task")
    add("--batch-size", type=positive_integer, default=8, help="questions answered together")
    add("--seed", type=int, default=DEVELOPMENT_SEED, help=f"of the pages and questions; test set: {HELD_OUT_SEED}")
    add("--builtin-font-only", action="store_true", help="draw the pages without the fonts that come with matplotlib")
    add("--device", type=choose_device, default="auto", help="where to run")
    add("--dtype", choices=DTYPES, default="float32", help="of the model; auto: that of the checkpoint")
    add("--json", type=output_file, help="write settings, versions and scores to this file")
    add("--note", type=output_file, help="write a Markdown table to this file")
    add("--from", dest="runs", nargs="+", type=read_run, help="for --note: JSON files, instead of a run")
    arguments = parser.parse_args(argv)
    if arguments.runs and not arguments.note:
        parser.error("--from needs --note")
    if not (arguments.runs or arguments.builtin_font_only) and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"drawing the pages without --builtin-font-only {NEED_MATPLOTLIB}")
    for name in ("budgets", "tasks"):
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; without `argv`, that of the program."""
    arguments = parse_arguments(argv)
    recorded = arguments.runs
    if not recorded:
        model, processor = load(arguments.model, arguments.device, arguments.dtype)
        chosen = [one for one in all_variations() if one.name in (PUBLISHED, *arguments.only)]
        scores = measure(model, processor, chosen, arguments)
        results = [result for budget in arguments.budgets for result in summarized(scores, chosen, budget)]
        recorded = [record(results, model, arguments)]
        print(table(recorded[0]))
        if arguments.json:
            arguments.json.write_text(json.dumps(recorded[0], indent=2) + "\n", encoding="utf-8")
    if arguments.note:
        arguments.note.write_text(note(recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
