"""Inputs of the kernel tests, at head counts and head dims of shipped models, and how far results may be off."""

import math
from dataclasses import dataclass

import torch

from shiftkv_kernels import reference


@dataclass(frozen=True)
class Problem:
    """One call of `group_mass`."""

    batch: int
    heads: int
    kv_heads: int
    proxies: int
    groups: int
    head_dim: int
    tokens: int
    padding: int = 0  # columns at the start of the last row
    value_dim: int | None = None  # None: that of the keys

    @property
    def id(self) -> str:
        padding = f"-pad{self.padding}" if self.padding else ""
        value = f"to{self.value_dim}" if self.value_dim else ""
        return (
            f"b{self.batch}-h{self.heads}of{self.kv_heads}-n{self.proxies}in{self.groups}"
            f"-d{self.head_dim}{value}-t{self.tokens}{padding}"
        )

    def tensors(self, device: torch.device, dtype: torch.dtype = torch.float32, spread: float = 2.0):
        """Proxies, last query and keys; the larger the spread, the fewer tokens have any weight."""
        generator = torch.Generator().manual_seed(self.tokens * 1000 + self.head_dim)
        shapes = (
            (self.batch, self.heads, self.proxies, self.head_dim),
            (self.batch, self.heads, 1, self.head_dim),
            (self.batch, self.kv_heads, self.tokens, self.head_dim),
        )
        queries, last, keys = (torch.randn(shape, generator=generator) for shape in shapes)
        return [part.to(device, dtype) for part in (queries * spread, last, keys)]

    def values(self, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.tokens * 1000 + self.head_dim + 1)
        shape = (self.batch, self.kv_heads, self.tokens, self.value_dim or self.head_dim)
        # Lengths differ, as those of a model's values do.
        lengths = torch.rand(*shape[:3], 1, generator=generator) + 0.1
        return (torch.randn(shape, generator=generator) * lengths).to(device, dtype)

    def kept(self, count: int, device: torch.device) -> torch.Tensor:
        """Some of the tokens, the last one among them, (B, H_kv, count) int64, as `keep_best` gives them."""
        generator = torch.Generator().manual_seed(count)
        scores = torch.rand(self.batch, self.kv_heads, self.tokens, generator=generator).to(device)
        return reference.keep_best(scores, count, self.valid(device))

    def softmax_options(self, kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
        """Learned sinks, which take about half of the mass, capped logits, or both."""
        draw = torch.randn(2 * self.heads, generator=torch.Generator().manual_seed(self.heads))
        sinks = (draw + math.log(self.tokens) + 2).to(device, dtype)[::2]
        options = {"sinks": sinks, "softcap": 1.5}
        return options if kind == "both" else {kind: options[kind]}

    def valid(self, device: torch.device) -> torch.Tensor | None:
        if not self.padding:
            return None
        padding = torch.zeros(self.batch, 1, dtype=torch.int64)
        padding[-1] = self.padding
        return (torch.arange(self.tokens) >= padding).to(device)

    def keywords(self, device: torch.device) -> dict:
        return {"num_groups": self.groups, "scaling": self.head_dim**-0.5, "valid": self.valid(device)}


# What is learned or capped, at few shapes: padding, several parts of the tokens, two tokens.
WITH_SINKS_OR_CAPPING = [
    (Problem(2, 7, 1, 16, 2, 40, 70, padding=30, value_dim=24), "both"),
    (Problem(1, 2, 2, 10, 2, 64, 165, value_dim=128), "both"),
    (Problem(1, 4, 4, 8, 2, 16, 33), "sinks"),
    (Problem(1, 4, 4, 8, 2, 16, 33), "softcap"),
    (Problem(1, 2, 1, 4, 4, 16, 2), "both"),
]


def exact_attention(queries, keys, *, scaling, valid, softcap=None, sinks=None):
    """Attention of queries (B, H, n, D), (B, H_kv, r, n, T) in float64, of what the inputs are in their own dtype."""
    rows = queries.double().unflatten(1, (keys.shape[1], -1))
    logits = rows @ keys.double().unsqueeze(2).mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None, None], -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    columns = sinks.double().view(1, *rows.shape[1:3], 1, 1).expand(*rows.shape[:4], 1)
    return torch.cat([logits, columns], dim=-1).softmax(-1)[..., :-1]


def exact_group_mass(queries, last, keys, *, num_groups, **keywords):
    """`group_mass` in float64, of what the inputs are in their own dtype."""
    count = queries.shape[2]

    def attention(rows):
        return exact_attention(rows, keys, **keywords).mean(2)

    last_mass = attention(last).squeeze(2)
    grouped = attention(queries).unflatten(2, (num_groups, count // num_groups)).sum(3)
    mass = (grouped + last_mass.unsqueeze(2)) / (1 + count // num_groups)
    mass[..., -1] = 0
    last_mass[..., -1] = 0
    return mass, last_mass


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over that of the exact result."""
    size = exact.norm().item()
    return (found.double() - exact).norm().item() / size if size else found.double().norm().item()


def allowed_errors(queries, last, keys, **keywords) -> list[float]:
    """Twice the reference's own error, and what the rounding of a logit does to its weight.

    Products of 16-bit inputs are exact in float32, so in every dtype both sides differ from float64 by the rounding of
    float32 sums alone.  An error of 2 ** -23 in a logit of that size in base 2 is one of as much, times ln 2, in the
    weight; tensor cores, which cut sums off instead of rounding them, are given four times that.
    """
    exact = exact_group_mass(queries, last, keys, **keywords)
    own = [
        relative_error(*pair) for pair in zip(reference.group_mass(queries, last, keys, **keywords), exact, strict=True)
    ]
    norms = queries.float().norm(dim=-1).max() * keys.float().norm(dim=-1).max()
    rounding = 4 * 2**-23 * max(norms.item() * keywords["scaling"], 1.0)
    return [2 * error + rounding for error in own]
