"""The training loop of the tiny Qwen2.5-VL, which runs for a given wall-clock time; `train.py` is its command line."""

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
from transformers import Qwen2_5_VLForConditionalGeneration

from tiny_vlm.batches import Batches, Progress
from tiny_vlm.build import build_config, build_generation_config, write_processor
from tiny_vlm.forward import check_against_reference
from tiny_vlm.step import Step, report


class Schedule:
    """The share of the training time that is over, 0..1, in wall-clock time.

    The first step compiles, so that the time counts from the second one on.
    """

    def __init__(self, seconds: float) -> None:
        """The training starts now and may take this many seconds."""
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.started: float | None = None

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def share(self, step: int) -> float:
        """To be asked once before each step; 1 means that the time is over."""
        now = time.monotonic()
        if step == 1:
            return 0.0
        if now >= self.deadline:
            return 1.0
        if self.started is None:
            self.started = now
        return (now - self.started) / (self.deadline - self.started)


def learning_rate(args: argparse.Namespace, step: int, share: float) -> float:
    """Linear warmup by steps, then half a cosine by time, down to `lr_end` of the full rate."""
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return float(args.lr * min(1, step / args.warmup) * (args.lr_end + (1 - args.lr_end) * cosine))


def load_model(init: Path | None, device: str) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint in `init`, or a new model, in float32."""
    if init is None:
        model = Qwen2_5_VLForConditionalGeneration(build_config())
    else:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(init, dtype=torch.float32)
    return model.to(device).train()


def save(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Writes the model in bfloat16, with the generation settings."""
    half = Qwen2_5_VLForConditionalGeneration(build_config())
    half.load_state_dict(model.state_dict())
    half.generation_config = build_generation_config()
    half.to(torch.bfloat16).save_pretrained(folder)


def load_batches(args: argparse.Namespace, progress: Progress, device: str) -> Iterator[dict[str, Tensor]]:
    """Batches drawn by worker processes, or by this one when `workers` is 0."""
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        Batches(args.seed, progress, args.shrink),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=3 if args.workers else None,
        pin_memory=device == "cuda",
    )
    return iter(loader)


class Log:
    """Prints a row of numbers now and then and appends it to a file of JSON lines."""

    def __init__(self, file: TextIO, schedule: Schedule) -> None:
        """Speed is counted from now on."""
        self.file, self.schedule = file, schedule
        self.last_images, self.last_elapsed = 0, schedule.elapsed()

    def write(self, row: dict[str, Any], images: int) -> None:
        """Adds images so far, seconds, and images per second since the last row."""
        elapsed = self.schedule.elapsed()
        speed = (images - self.last_images) / (elapsed - self.last_elapsed)
        self.last_images, self.last_elapsed = images, elapsed
        line = json.dumps(row | {"images": images, "seconds": round(elapsed, 1), "images_per_second": round(speed)})
        print(line, flush=True)
        print(line, file=self.file, flush=True)


def train(args: argparse.Namespace) -> None:
    """Trains as the arguments of `train.parse` say and writes the checkpoint to `args.out`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    schedule = Schedule(args.seconds)
    progress = multiprocessing.Value("d", args.start)
    batches = load_batches(args, progress, device)
    model = load_model(args.init, device)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    print(f"largest difference to the reference logits {check_against_reference(model, device):.1e}")
    write_processor(args.out)
    take_step = Step(model, device, args.aux, args.compile, args.graphs)

    images, step, saved_at = 0, 0, schedule.elapsed()
    with open(args.out / "log.jsonl", "a") as file:
        log = Log(file, schedule)
        while step < args.steps and (share := schedule.share(step + 1)) < 1:
            step += 1
            progress.value = args.start + (1 - args.start) * share
            rate = learning_rate(args, step, share)
            batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
            outputs = take_step(batch, rate)
            images += len(batch["cover"])
            if step % args.log_every == 0 or step == 1:
                log.write(dict(step=step, lr=round(rate, 6), **report(batch, outputs)), images)
                if schedule.elapsed() - saved_at > args.save_every:
                    save(model, args.out)
                    saved_at = schedule.elapsed()
    report(batch, outputs)  # refuses to save a model whose loss is not finite
    save(model, args.out)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    print(f"{step} steps, {images} images, {schedule.elapsed():.0f} s, peak GPU memory {memory:.1f} GiB", flush=True)
