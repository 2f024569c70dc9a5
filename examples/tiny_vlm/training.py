"""The training loop of both tiny models, which runs for a given wall-clock time; `train.py` is its command line."""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tiny_vlm.architectures import ARCHITECTURES, Architecture
from tiny_vlm.batches import Batches, Progress
from tiny_vlm.state import Record, load_record, load_state, save_state
from tiny_vlm.step import Step, report


class Schedule:
    """The share of the planned training time that is over, 0..1, in wall-clock time.

    The first step of a run compiles, so that its time counts from the second one on.
    """

    def __init__(self, seconds: float, planned: float | None = None, done: float = 0.0) -> None:
        """This run starts now and may take `seconds`.

        The whole training takes `planned` seconds, of which earlier runs took `done`; without a plan it ends with the
        time of this run.
        """
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.planned, self.done = planned, done
        self.started: float | None = None

    def elapsed(self) -> float:
        """Seconds since the start of this run."""
        return time.monotonic() - self.began

    def counted(self) -> float:
        """Seconds that count for the plan, over all runs."""
        return self.done + (time.monotonic() - self.started if self.started is not None else 0.0)

    def share(self, step: int) -> float | None:
        """To be asked once before each step, which is counted from 1 in each run; None means that the time is over."""
        if step > 1 and time.monotonic() >= self.deadline:
            return None
        if step == 2:
            self.started = time.monotonic()
        planned = self.planned or self.done + self.deadline - (self.started or self.began)
        if step == 1:
            return min(self.done / planned, 1.0) if self.done else 0.0
        share = self.counted() / planned
        return share if share < 1 else None


def learning_rate(args: argparse.Namespace, step: int, share: float) -> float:
    """Linear warmup by steps, then half a cosine by time, down to `lr_end` of the full rate."""
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return float(args.lr * min(1, step / args.warmup) * (args.lr_end + (1 - args.lr_end) * cosine))


def load_model(architecture: Architecture, init: Path | None, device: str) -> Any:
    """The checkpoint in `init`, or a new model, in float32."""
    if init is None:
        model = architecture.build_model()
    else:
        model = architecture.model_class.from_pretrained(init, dtype=torch.float32)
    return model.to(device).train()


def save(architecture: Architecture, model: Any, folder: Path) -> None:
    """Writes the model in bfloat16, with the generation settings."""
    half = architecture.model_class(architecture.build_config())
    half.load_state_dict(model.state_dict())
    half.generation_config = architecture.build_generation_config()
    half.to(torch.bfloat16).save_pretrained(folder)


def load_batches(
    args: argparse.Namespace, architecture: Architecture, record: Record, progress: Progress, device: str
) -> Iterator[dict[str, Tensor]]:
    """Batches drawn by worker processes, or by this one when `workers` is 0; other pages in each run."""
    seed = f"{args.seed}-run-{record.runs}" if record.runs else f"{args.seed}"
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        Batches(architecture.make_batch, seed, progress, args.shrink),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=3 if args.workers else None,
        pin_memory=device == "cuda",
    )
    return iter(loader)


class Log:
    """Prints a row of numbers now and then and appends it to a file of JSON lines."""

    def __init__(self, file: TextIO, schedule: Schedule, images: int) -> None:
        """Speed is counted from now on, when there have been so many images."""
        self.file, self.schedule = file, schedule
        self.last_images, self.last_elapsed = images, schedule.elapsed()

    def write(self, row: dict[str, Any], images: int) -> None:
        """Adds images so far, seconds, and images per second since the last row."""
        elapsed = self.schedule.elapsed()
        speed = (images - self.last_images) / (elapsed - self.last_elapsed)
        self.last_images, self.last_elapsed = images, elapsed
        line = json.dumps(row | {"images": images, "seconds": round(elapsed, 1), "images_per_second": round(speed)})
        print(line, flush=True)
        print(line, file=self.file, flush=True)


class Training:
    """A model with everything that trains it: what one run begins with."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Reads the checkpoint or the state to go on from; the time runs from here."""
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.architecture = ARCHITECTURES[args.model]
        self.record = load_record(args.resume, args.model) if args.resume else Record(args.model)
        self.schedule = Schedule(args.seconds, args.planned_seconds, self.record.seconds)
        torch.manual_seed(args.seed + self.record.runs)
        self.progress = multiprocessing.Value("d", args.start)
        self.batches = load_batches(args, self.architecture, self.record, self.progress, self.device)
        self.model = load_model(self.architecture, args.init, self.device)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        fast = self.architecture.fast_forward(self.model, dtype, args.compile)
        self.step = Step(self.model, fast, self.device, args.aux, args.graphs)
        if args.resume:
            load_state(args.resume, self.step, self.record)
        self.record.runs += 1

    def check(self) -> None:
        """Prints the model's size and how far its fast forward pass is from the unpatched model."""
        print(f"{sum(parameter.numel() for parameter in self.model.parameters()):,} parameters")
        difference = self.architecture.check_against_reference(self.model, self.device)
        print(f"largest difference to the reference logits {difference:.1e}", flush=True)

    def take_step(self, share: float) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        """Makes one step; returns learning rate, batch and outputs."""
        self.record.steps += 1
        self.progress.value = self.args.start + (1 - self.args.start) * share
        rate = learning_rate(self.args, self.record.steps, share)
        batch = {name: value.to(self.device, non_blocking=True) for name, value in next(self.batches).items()}
        outputs = self.step(batch, rate)
        self.record.images += len(batch["cover"])
        return rate, batch, outputs

    def save(self) -> None:
        """Writes the checkpoint, and the state that `--resume` takes."""
        self.record.seconds = self.schedule.counted()
        save(self.architecture, self.model, self.args.out)
        save_state(self.args.out / "state", self.step, self.record)


def train(args: argparse.Namespace) -> None:
    """Trains as the arguments of `train.parse` say and writes the checkpoint to `args.out`."""
    training = Training(args)
    training.check()
    architecture, schedule, record = training.architecture, training.schedule, training.record
    architecture.write_processor(args.out)
    steps, saved_at = 0, schedule.elapsed()
    with open(args.out / "log.jsonl", "a") as file:
        log = Log(file, schedule, record.images)
        while steps < args.steps and (share := schedule.share(steps + 1)) is not None:
            steps += 1
            rate, batch, outputs = training.take_step(share)
            if record.steps % args.log_every == 0 or steps == 1:
                row = {"step": record.steps, "share": round(share, 4), "lr": round(rate, 6)}
                log.write(row | report(batch, outputs, architecture.tasks), record.images)
                if schedule.elapsed() - saved_at > args.save_every:
                    training.save()
                    saved_at = schedule.elapsed()
    report(batch, outputs, architecture.tasks)  # refuses to save a model whose loss is not finite
    training.save()
    memory = torch.cuda.max_memory_allocated() / 2**30 if training.device == "cuda" else 0.0
    print(
        f"{record.steps} steps, {record.images} images, {schedule.elapsed():.0f} s, peak GPU memory {memory:.1f} GiB",
        flush=True,
    )
