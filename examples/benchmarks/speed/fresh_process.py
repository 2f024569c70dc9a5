"""What starts.py runs in a process of its own for each cache: its first call of `generate`, and prompts after it.

`python fresh_process.py SETTINGS RESULTS`: two files of JSON, which starts.py writes and reads.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: its own folder is on the path, the folder examples is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.speed.compilations import CompilationCounter
from benchmarks.speed.decoding import CacheKind, random_prompt, synchronize
from benchmarks.speed.decoding_run import cache_kinds, load_model
from mmshiftkv import CACHE_ARGUMENT

TOKENS_OF_A_PROMPT = 3  # the prefill gives one; the others show whether a step is compiled again
FURTHER_CALLS = 3  # a step is recorded as a CUDA graph when it runs the second time, and checked at the third


class FirstToken(StoppingCriteria):
    """Stops nothing; knows when the first token was there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.time: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Looks at the clock, once the device is done."""
        if self.time is None:
            synchronize(self._device)
            self.time = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=self._device)


def generate(model: Any, kind: CacheKind, tokens: int, room: int, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first and to the last of `new_tokens`; a new cache for `room` of them is made in that time."""
    ids = random_prompt(model, 1, tokens)
    synchronize(model.device)
    first = FirstToken(model.device)
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_ARGUMENT: kind.make_cache(tokens, room)},
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([first]),
        **kind.generate,
    )
    synchronize(model.device)
    end = time.perf_counter()
    if first.time is None:
        raise RuntimeError(f"{kind.name}: the loop did not ask the stopping criteria after the first token")
    return first.time - start, end - start


def cold_start(
    model: Any, kind: CacheKind, tokens: int, new_tokens: int, counter: CompilationCounter
) -> dict[str, Any]:
    """The first call of `generate` in this process up to its second token, and a later one with another cache."""
    before = counter.count()
    first, second = generate(model, kind, tokens, new_tokens, 2)
    compiled = counter.count() - before
    for _ in range(FURTHER_CALLS):
        _, again = generate(model, kind, tokens, new_tokens, 2)
    return {"first_token": first, "second_token": second, "again": again, **asdict(compiled)}


def prompts(
    model: Any, kind: CacheKind, lengths: tuple[int, int], count: int, new_tokens: int, counter: CompilationCounter
) -> dict[str, list[Any]]:
    """Prompts of random lengths from `lengths`: tokens, seconds to the first token, and what each of them compiled."""
    chosen = random.Random(0).choices(range(lengths[0], lengths[1] + 1), k=count)
    seconds, graphs, kernels = [], [], []
    for tokens in chosen:
        before = counter.count()
        seconds.append(generate(model, kind, tokens, new_tokens, TOKENS_OF_A_PROMPT)[0])
        compiled = counter.count() - before
        graphs.append(compiled.graphs)
        kernels.append(compiled.kernels)
    return {"tokens": chosen, "seconds": seconds, "graphs": graphs, "kernels": kernels}


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """What came of the cache `settings["cache"]`: its decoding, and whatever was asked for."""
    arguments = argparse.Namespace(**settings)
    arguments.device = torch.device(arguments.device)
    counter = CompilationCounter()
    model = load_model(arguments)
    model.generation_config = GenerationConfig()
    kind = next(kind for kind in cache_kinds(model, arguments) if kind.name == arguments.cache)
    lengths = min(arguments.lengths), max(arguments.lengths)
    found: dict[str, Any] = {"decoding": kind.decoding_on(model.device, lengths[1], arguments.new_tokens)}
    if arguments.cold_start:
        found["cold_start"] = cold_start(model, kind, lengths[1], arguments.new_tokens, counter)
    if arguments.count:
        found["prompts"] = prompts(model, kind, lengths, arguments.count, arguments.new_tokens, counter)
    return found


if __name__ == "__main__":
    given, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps(main(json.loads(given.read_text(encoding="utf-8")))), encoding="utf-8")
