"""A benchmark in several processes, each with its share of the work; accelerate says which this one is."""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from common import needs_package

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part")
# As long as a process may wait for the others: torch's own limit, ten minutes, is no more than some answers take.
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among those that a launcher started; without a launcher it is alone.

    Attributes:
        index: its number, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that shows and writes the results."""
        return self.index == 0

    def does(self, number: int) -> bool:
        """Whether a piece of the work, by its number, is this process's."""
        return number % self.count == self.index

    def gather(self, parts: Sequence[tuple[int, Part]]) -> list[Part]:
        """What all processes made, each of its pieces with their numbers, in the order of these; waits for all."""
        everything = list(parts)
        if self.count > 1:
            from accelerate.utils import gather_object

            everything = gather_object(everything)
        return [part for _, part in sorted(everything, key=lambda numbered: numbered[0])]


@contextlib.contextmanager
def launched(device: "torch.device") -> Iterator[Processes]:
    """Meets the other processes, if a launcher started some; each has a GPU of its own as its current one.

    Args:
        device: where the processes run: with "cpu" they need no GPU.

    Raises:
        argparse.ArgumentTypeError: there are several, and accelerate is not installed.
    """
    import torch

    if not torch.distributed.is_torchelastic_launched():
        yield Processes()
        return
    needs_package("accelerate", "vision")
    from accelerate import PartialState
    from transformers.utils import logging

    state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    processes = Processes(state.process_index, state.num_processes)
    if not processes.is_main:
        logging.disable_progress_bar()
    yield processes
    # Not after a failure: the others may be waiting for this process, and its end is what ends them.
    state.destroy_process_group()
