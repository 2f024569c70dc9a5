"""Counts what is compiled in a process."""

import importlib.util
from dataclasses import dataclass
from typing import Any

from torch._dynamo.utils import counters


@dataclass(frozen=True)
class Compilations:
    """What was compiled so far.

    Attributes:
        graphs: by torch.compile, what it compiled again for another size included.
        kernels: by Triton in this process, without what it found in its folder.  Most of those of a graph are compiled
            by processes that Inductor starts, and are not among them.
    """

    graphs: int
    kernels: int

    def __sub__(self, earlier: "Compilations") -> "Compilations":
        """What was compiled since."""
        return Compilations(self.graphs - earlier.graphs, self.kernels - earlier.kernels)


class CompilationCounter:
    """Counts from when it is made, to the end of the process; whoever else listens to Triton goes on to hear of it."""

    def __init__(self) -> None:
        self._kernels = 0
        if importlib.util.find_spec("triton") is None:  # there is none on some platforms, and nothing to compile
            return
        from triton import knobs

        self._listener = knobs.compilation.listener
        knobs.compilation.listener = self._count

    def _count(self, *, cache_hit: bool, **compilation: Any) -> None:
        self._kernels += not cache_hit
        if self._listener is not None:
            self._listener(cache_hit=cache_hit, **compilation)

    def count(self) -> Compilations:
        """What was compiled so far."""
        return Compilations(counters["stats"]["unique_graphs"], self._kernels)
