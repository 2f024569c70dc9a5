"""A process that examines families, so that a crash or a hang of one ends nothing else."""

import multiprocessing
import os
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

from .configs import Family


class Worker:
    """Examines one family after another in a process of its own, which is started anew when it was lost.

    Args:
        limit: seconds that one family may take.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._connection: Connection | None = None

    def examine(self, family: Family) -> dict[str, Any]:
        """As `examine.examine`; what hangs is faulty, as what crashes is."""
        if self._process is None:
            self._start()
        assert self._connection is not None
        self._connection.send(family)
        begin = time.monotonic()
        lost = {"class": family.class_name, "outcome": "faulty"}
        try:
            if self._connection.poll(self._limit):
                return self._connection.recv()
            lost["reason"] = f"took more than {time.monotonic() - begin:.0f} s"
        except EOFError:
            self._process.join()
            lost["reason"] = f"its process ended with exit code {self._process.exitcode}"
        self.close()
        return lost

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        mine, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection = mine
        # The process says when it has imported everything.
        mine.recv()


def _serve(connection: Connection) -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch
    import transformers

    from .examine import examine

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    connection.send(None)
    while True:
        try:
            family = connection.recv()
        except EOFError:
            return
        connection.send(examine(family))
