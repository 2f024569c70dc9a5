"""Runs the cases in one process, and in all processes of a torchrun that share the models; writes what they gave.

    python -m torch.distributed.run --nproc-per-node 2 tests/parallel/worker.py FOLDER
    python -m torch.distributed.run --nproc-per-node 2 tests/parallel/worker.py FOLDER --fail

FOLDER holds the models, each in a folder of its name, and gets `record.json`: for each case what one process gave, and
what each rank did.  What the example prints without arguments goes to the output.  With `--fail` the last rank gives
its cache a budget that is refused, and all others go on.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.distributed import DistributedConfig

import tensor_parallel
from mmshiftkv import ShiftKVCache
from parallel import cases

_SECONDS_TO_WAIT = 60
_EAGER = ("sinks", "heads everywhere")


def load(folder: Path, name: str, **options: Any) -> cases.Loaded:
    """The model of a folder, and its processor if it has one."""
    has_images = (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists()
    kind = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    attention = "eager" if folder.name in _EAGER else "sdpa"
    model = kind.from_pretrained(folder, dtype="float32", attn_implementation=attention, **options).eval()
    return cases.Loaded(model, AutoProcessor.from_pretrained(folder) if has_images else None, folder.parent, name)


def in_json(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "kept": [kept.tolist() for kept in found["kept"]]} if "kept" in found else found


def obstacle(shared: cases.Loaded) -> str | None:
    """Why transformers cannot run the model so, with a cache of its own; None: it can."""
    try:
        shared.model.generate(cases.models.prompt_ids(), max_new_tokens=2)
    except RuntimeError as error:
        return str(error)
    return None


def run_cases(folder: Path, rank: int, ranks: int) -> list[dict[str, Any]]:
    """Of each case what one process gives and what each rank does; complete on rank 0 only.

    Of models that transformers cannot run so, only what is to be refused.
    """
    record = []
    for name in dict.fromkeys(model for model, _ in cases.CASES):
        shared = load(folder / name, str(rank), distributed_config=DistributedConfig(tp_plan="auto"))
        whole = load(folder / name, "whole") if rank == 0 else None
        reason = obstacle(shared)
        for (model, what), case in cases.CASES.items():
            if model != name:
                continue
            if reason is not None and what != "refused":
                record.append({"model": model, "case": what, "obstacle": reason})
                continue
            alone = None if whole is None else in_json(case(whole))
            # Before it all ranks wait for the one that was alone, and what that one has written is there.
            dist.barrier()
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, in_json(case(shared)))
            record.append({"model": model, "case": what, "obstacle": reason, "alone": alone, "ranks": gathered})
    return record


def fail(folder: Path, rank: int, ranks: int) -> None:
    shared = load(folder / "heads", str(rank), distributed_config=DistributedConfig(tp_plan="auto"))
    cache = ShiftKVCache(shared.model, budget=0 if rank == ranks - 1 else 8)
    cases.answer(shared, cache)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fail", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=_SECONDS_TO_WAIT))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if arguments.fail:
        fail(arguments.folder, rank, ranks)
    else:
        record = run_cases(arguments.folder, rank, ranks)
        if rank == 0:
            (arguments.folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
        if not any(one["obstacle"] for one in record if one["model"] == "qwen"):
            tensor_parallel.main([])
            return
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
