"""Trains a tiny model on synthetic pages, on one GPU (or, slowly, on a CPU), for a given wall-clock time.

    python -m tiny_vlm.train --out out --seconds 450
    python -m tiny_vlm.train --model llava --out out --seconds 440 --planned-seconds 860
    python -m tiny_vlm.train --model llava --out more --seconds 520 --resume out/state

Run it in the folder `examples`. The folder `out` then holds a checkpoint with its processor, `log.jsonl`, and in
`state` what `--resume` needs to go on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import errors_in_one_line, existing_folder, needs_checkpoint, needs_package, positive_integer, script_parser

MODELS = ("qwen", "llava")  # the keys of architectures.ARCHITECTURES, whose import takes seconds


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments; exits with a message when they are wrong."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="qwen", help="which of the two models (default: %(default)s)")
    add("--out", required=True, type=Path, help="folder to write the checkpoint to")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--init", type=existing_folder, help="folder of a checkpoint whose weights to begin with")
    begin.add_argument("--resume", type=existing_folder, help="folder `state` of an earlier run to go on from")
    add(
        "--seconds",
        type=float,
        default=500,
        help="wall-clock time, from the start of the program (default: %(default)s)",
    )
    add(
        "--planned-seconds",
        type=float,
        help="training time of all runs together, over which the learning rate falls and the curriculum goes"
        " (default: until the end of this run)",
    )
    add(
        "--steps",
        type=positive_integer,
        default=10**9,
        help="stop after this many steps (default: when the time is over)",
    )
    add("--start", type=float, default=0.0, help="where in the curriculum (0..1) to start (default: %(default)s)")
    add("--lr", type=float, default=1.2e-3, help="highest learning rate (default: %(default)s)")
    add(
        "--lr-end", type=float, default=0.01, help="learning rate at the end, as a share of --lr (default: %(default)s)"
    )
    add("--warmup", type=positive_integer, default=400, help="steps (default: %(default)s)")
    add("--aux", type=float, default=0.5, help="weight of the training-only character head (default: %(default)s)")
    add("--workers", type=int, default=14, help="processes that draw pages (default: %(default)s)")
    add(
        "--shrink",
        type=positive_integer,
        default=1,
        help="divide the batch size, for a try on a CPU (default: %(default)s)",
    )
    add("--seed", type=int, default=1, help="of the pages and the weights (default: %(default)s)")
    add("--log-every", type=positive_integer, default=100, help="steps (default: %(default)s)")
    add("--save-every", type=float, default=60, help="seconds (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile (default: yes)")
    add(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use CUDA graphs where there is a GPU (default: yes)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; without `arguments`, that of the program."""
    args = parse(arguments)
    with errors_in_one_line():
        for package in ("PIL", "torchvision"):
            needs_package(package, "vision")
        needs_package("matplotlib", "plot")
        if args.init:
            needs_checkpoint(str(args.init))
    from tiny_vlm.training import train

    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
