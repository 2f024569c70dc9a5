"""One optimizer step of the training, and what to report about it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_vlm.architectures import Forward
from tiny_vlm.batches import CHARS_PER_PATCH, IGNORE
from tiny_vlm.forward import linear
from tiny_vlm.pixels import paint

CHARACTERS = 128  # classes of the character head: ASCII, 0 for none
BLANK_WEIGHT = 0.05  # of patch slots without a character, which would outweigh the others


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy; logits (..., classes), targets and weights (...)."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    weights = weights.flatten()
    return (losses * weights).sum() / weights.sum().clamp(min=1)


class Step:
    """One optimizer step on a batch; on a GPU, a CUDA graph for each page size.

    `aux` is the weight of the loss of a head that names the characters in each patch. The head serves training only: it
    teaches the vision part to read before the text part has learned where to look.
    """

    def __init__(self, model: Any, fast: Forward, device: str, aux: float, graphs: bool) -> None:
        """Takes the model's parameters into an optimizer; `fast` is its forward pass, `graphs` is for speed alone."""
        self.aux, self.use_graphs = aux, graphs and device == "cuda"
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, dict[str, Tensor], dict[str, Tensor]]] = {}
        self.head = torch.nn.Linear(model.config.vision_config.hidden_size, CHARS_PER_PATCH * CHARACTERS).to(device)
        self.fast = fast
        self.named_parameters = dict(model.named_parameters()) | {
            f"character_head.{name}": parameter for name, parameter in self.head.named_parameters()
        }
        self.parameters = list(self.named_parameters.values())
        groups = [
            {"params": [parameter for parameter in self.parameters if parameter.ndim > 1], "weight_decay": 0.05},
            {"params": [parameter for parameter in self.parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        gpu = {"fused": True, "capturable": True} if device == "cuda" else {}
        # The rate is a tensor: a captured graph reads it anew in each replay.
        self.optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.0, device=device), betas=(0.9, 0.98), **gpu)

    def run(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses, logits (images, text, vocabulary) and character logits (images, patches, slots, characters)."""
        logits, features = self.fast(paint(batch), batch["inputs"], batch["offsets"], batch["segments"])
        targets, characters = batch["targets"], batch["characters"].long()
        loss = weighted_loss(logits, targets.clamp(min=0), (targets != IGNORE).float())
        spotted = linear(features, self.head.weight, self.head.bias).unflatten(-1, (CHARS_PER_PATCH, CHARACTERS))
        importance = BLANK_WEIGHT + (1 - BLANK_WEIGHT) * (characters > 0)
        aux = weighted_loss(spotted, characters, importance)
        (loss + self.aux * aux).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "aux": aux.detach(), "logits": logits.detach(), "spotted": spotted.detach()}

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate, for captured graphs too."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)

    def capture(
        self, batch: dict[str, Tensor], rate: float
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], dict[str, Tensor]]:
        """A graph of `run`, the tensors that it reads its batch from, and those that it leaves its results in.

        Leaves the learning rate at `rate`.
        """
        held = {name: value.clone() for name, value in batch.items()}
        self.set_rate(0.0)  # so that the losses before and after can be compared
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                expected = self.run(held)["loss"].item()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader pins memory meanwhile
            outputs = self.run(held)
        graph.replay()
        found = outputs["loss"].item()
        self.set_rate(rate)
        weight = self.parameters[0].detach().clone()
        graph.replay()
        moved = not torch.equal(weight, self.parameters[0])
        if abs(found - expected) > 0.1 * expected + 0.01 or not moved:
            raise RuntimeError(f"the CUDA graph does not train: loss {expected} before, {found} after, moved {moved}")
        return graph, held, outputs

    def __call__(self, batch: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
        """Makes the step at learning rate `rate`; returns what `run` does, valid until the next step."""
        self.set_rate(rate)
        if not self.use_graphs:
            return self.run(batch)
        shape = tuple(batch["cover"].shape)
        if shape not in self.graphs:
            self.graphs[shape] = self.capture(batch, rate)
        graph, held, outputs = self.graphs[shape]
        for name, value in batch.items():
            held[name].copy_(value)
        graph.replay()
        return outputs


@torch.no_grad()
def report(batch: dict[str, Tensor], outputs: dict[str, Tensor], tasks: Sequence[str]) -> dict[str, Any]:
    """Losses, and accuracies with the true text so far given, of the step just made; `tasks` are those of the model.

    A task without questions in the batch has the accuracy None. Raises FloatingPointError when the loss is not finite.
    """
    loss = outputs["loss"].item()
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is not finite")
    counted = batch["targets"] != IGNORE
    right = (outputs["logits"].argmax(-1) == batch["targets"]) & counted
    token_accuracy = {}
    for number, task in enumerate(tasks):
        here = batch["tasks"] == number
        total = int((counted & here).sum())
        token_accuracy[task] = round(int((right & here).sum()) / total, 4) if total else None
    seen = batch["characters"] > 0
    spotted = (outputs["spotted"].argmax(-1) == batch["characters"])[seen].float().mean().item()
    return {
        "loss": round(loss, 4),
        "aux": round(outputs["aux"].item(), 4),
        "spotted": round(spotted, 4),
        "token_accuracy": token_accuracy,
    }
