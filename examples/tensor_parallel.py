"""Ask one question about one image with a model that several processes share: on GPUs (NCCL), or on CPUs (gloo).

    torchrun --nproc-per-node 2 tensor_parallel.py
    torchrun --nproc-per-node 2 tensor_parallel.py --decode-ahead --budget 64 --preset value-aware
    torchrun --nproc-per-node 8 tensor_parallel.py --model Qwen/Qwen2.5-VL-72B-Instruct --image page.png \
        --question "What is due?" --budget 256 --no-compare

It prints the answers with the full and with a compressed cache, what the heads of each rank keep of the prompt, and
how far tokens and kept columns are those of one process that holds the whole model.  For that the first process loads
the model once more, whole; `--no-compare` leaves it out.  Without arguments nothing is downloaded.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common import (
    DTYPES,
    TINY_MODEL,
    budget,
    errors_in_one_line,
    fail,
    fill_in_sample,
    image_file,
    named_model,
    needs_checkpoint,
    needs_package,
    positive_integer,
    script_parser,
)
from quickstart import PRESETS, build_inputs

if TYPE_CHECKING:
    import torch
    from transformers import Cache


@dataclass(frozen=True)
class Run:
    """What one process saw: the ids of both answers, the columns kept, the bytes held and those of a full cache.

    `kept` has a list for each KV head of each layer.
    """

    full: list[int]
    compressed: list[int]
    kept: list[list[list[int]]]
    bytes_stored: int
    bytes_full: int


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with image and question filled in from the sample documents where none are given."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--model",
        type=named_model,
        default=str(TINY_MODEL),
        help='hub id or local folder; "qwen" and "llava" are the small models next to this script (default: qwen)',
    )
    add("--image", type=image_file, help="image file (default: a sample document)")
    add("--question", help="needed with --image (default: the sample document's)")
    add("--budget", type=budget, default=16, help="prompt tokens to keep, or the share of them (default: %(default)s)")
    add("--preset", choices=PRESETS, default="published", help="settings to select with (default: %(default)s)")
    add("--max-new-tokens", type=positive_integer, default=64, help="of the answer (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    add("--decode-ahead", action="store_true", help="fixed storage and `decode_ahead`, which GPUs run compiled")
    add("--no-compare", action="store_true", help="do not load the whole model into the first process too")
    arguments = parser.parse_args(argv)
    fill_in_sample(parser, arguments)
    return arguments


def load(arguments: argparse.Namespace, **where: Any) -> Any:
    """The model, where it is said to be."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=arguments.dtype, **where).eval()


def answer(model: Any, inputs: Any, cache: "Cache", max_new_tokens: int, **options: Any) -> list[int]:
    """The ids of the greedy answer."""
    from mmshiftkv import CACHE_ARGUMENT

    given = {**inputs, CACHE_ARGUMENT: cache, "max_new_tokens": max_new_tokens, "do_sample": False, **options}
    ids: torch.Tensor = model.generate(**given)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def run(arguments: argparse.Namespace, model: Any, inputs: Any) -> Run:
    """Answers the question with both caches."""
    from mmshiftkv import ShiftKVCache, decode_ahead, make_cache

    tokens = arguments.max_new_tokens
    fixed, loop = (
        ({"max_new_tokens": tokens}, {"custom_generate": decode_ahead}) if arguments.decode_ahead else ({}, {})
    )
    cache = ShiftKVCache(model, budget=arguments.budget, preset=arguments.preset, **fixed)
    compressed = answer(model, inputs, cache, tokens, **loop)
    columns = [cache.kept_indices(index) for index in range(len(cache.layers))]
    kept = [layer[0].tolist() for layer in columns if layer is not None]
    full = answer(model, inputs, make_cache("full", model), tokens)
    report = cache.report()
    return Run(full, compressed, kept, report.bytes_stored, report.bytes_full)


def kept_together(ranks: Sequence[Run], heads: int) -> list[list[list[int]]]:
    """What all ranks keep of a model with so many KV heads: of each layer, a list for each head."""
    if len(ranks[0].kept[0]) == heads:  # the model's plan gives all heads to each rank
        return ranks[0].kept
    layers = zip(*(rank.kept for rank in ranks), strict=True)
    return [[head for part in layer for head in part] for layer in layers]


def comparison(ranks: Sequence[Run], whole: Run) -> list[str]:
    """How far the ranks did what one process does."""
    lines = []
    for name in ("full", "compressed"):
        ids = getattr(whole, name)
        same = all(getattr(rank, name) == ids for rank in ranks)
        lines.append(f"{name} cache: {'the same tokens' if same else f'other tokens, one process gives {ids}'}")
    together = kept_together(ranks, len(whole.kept[0]))
    heads = [
        (set(mine), set(other))
        for layer, other_layer in zip(together, whole.kept, strict=True)
        for mine, other in zip(layer, other_layer, strict=True)
    ]
    others, tokens = sum(len(other - mine) for mine, other in heads), sum(len(other) for _, other in heads)
    lines.append(f"kept: {others} of {tokens} tokens, of {len(heads)} heads of all layers, are others")
    return lines


def print_ranks(ranks: Sequence[Run]) -> None:
    """What each rank holds, and the columns that it keeps in the first layer that is compressed."""
    from mmshiftkv.report import format_bytes

    for index, rank in enumerate(ranks):
        sizes = f"{format_bytes(rank.bytes_stored)}, with a full cache {format_bytes(rank.bytes_full)}"
        print(f"\nrank {index} holds {sizes}; its first compressed layer keeps")
        for number, head in enumerate(rank.kept[0]):
            print(f"  of its head {number}: {' '.join(map(str, head))}")


def measure(arguments: argparse.Namespace) -> tuple[list[Run], Run | None, list[str]]:
    """What each rank saw, what one process sees, and both answers as text; the latter two on rank 0 only."""
    import torch.distributed as dist
    from transformers import AutoProcessor
    from transformers.distributed import DistributedConfig

    processor = AutoProcessor.from_pretrained(arguments.model)
    model = load(arguments, distributed_config=DistributedConfig(tp_plan="auto"))
    inputs = build_inputs(processor, arguments.image, arguments.question).to(model.device, model.dtype)
    mine = run(arguments, model, inputs)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    whole = None
    if dist.get_rank() == 0 and not arguments.no_compare:
        whole = run(arguments, load(arguments).to(model.device), inputs)
    dist.barrier()
    texts = [processor.decode(ids, skip_special_tokens=True).strip() for ids in (mine.full, mine.compressed)]
    return ranks, whole, texts if dist.get_rank() == 0 else []


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with these arguments, or with those of the command line."""
    arguments = parse_arguments(argv)
    with errors_in_one_line():
        needs_package("PIL", "vision")
        needs_package("torchvision", "vision")
        needs_checkpoint(arguments.model)
    if "RANK" not in os.environ:
        fail("start it with torchrun: torchrun --nproc-per-node 2 tensor_parallel.py")
    # What goes wrong here goes wrong as it is: the processes are apart, and one line of each would not do.
    ranks, whole, texts = measure(arguments)
    import torch
    import torch.distributed as dist

    if texts:
        device = "CPU" if dist.get_backend() == "gloo" else torch.cuda.get_device_name()
        print(f"{len(ranks)} processes, {dist.get_backend()}, {device}, {arguments.dtype}\n")
        print(f"question: {arguments.question}\nfull cache: {texts[0]}\nbudget {arguments.budget}: {texts[1]}")
        print_ranks(ranks)
    if whole is not None:
        print("\ncompared with one process that holds the whole model:")
        print("\n".join(comparison(ranks, whole)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
