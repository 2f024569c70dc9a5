"""Decoding steps recorded as CUDA graphs, and kept with their model."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

# Caches of other sizes, batches of other sizes and several caches at a time have recordings of their own.
_MOST_RECORDINGS = 16

Step = Callable[[], torch.Tensor]
Inputs = dict[Hashable, torch.Tensor]


class Recording:
    """One step, recorded the second time it is run; its inputs stay where they are.

    On a device other than CUDA it just runs.

    Args:
        recorder: that of the model.
        inputs: tensors that the step reads and may change, by name.
    """

    def __init__(self, recorder: "Recorder", inputs: Inputs) -> None:
        self.inputs = inputs
        self._recorder = recorder
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: torch.Tensor | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether the next run is a replay, for which nothing is called any more."""
        return self._graph is not None

    def run(self, step: Step) -> torch.Tensor:
        """Runs the step, or replays what it did when it was recorded.

        Args:
            step: does the same to the same storage each time.

        Returns:
            What `step` gave, in memory of its own.
        """
        recorder = self._recorder
        if recorder.stream is None:
            return step()
        with recorder.lock, torch.cuda.device(recorder.stream.device):
            if self._graph is None and not self._is_warm:
                # The first run compiles and allocates what stays, which must not be recorded.
                output = recorder.run_aside(step)
                self._is_warm = True
                return output
            if self._graph is None:
                self._graph, self._output = recorder.record(step)
            return recorder.replay(self._graph, self._output)


class Recorder:
    """All recordings of one model.

    They share memory for what is between a step's inputs and its output, so they are replayed one after another, from
    whatever thread and stream.

    Args:
        device: of the model.

    Attributes:
        stream: where steps are recorded; None where there are no CUDA graphs.
        lock: held while one of them is recorded or replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def __len__(self) -> int:
        """How many steps have been recorded, or will be."""
        return len(self._recordings)

    def find(self, key: Hashable, make_inputs: Callable[[], Inputs]) -> Recording:
        """The recording of that key, a new one if there is none."""
        with self.lock:
            found = self._recordings.get(key)
            if found is None:
                found = self._recordings[key] = Recording(self, make_inputs())
                if len(self._recordings) > _MOST_RECORDINGS:
                    self._recordings.popitem(last=False)
            self._recordings.move_to_end(key)
            return found

    def run_aside(self, step: Step) -> torch.Tensor:
        """Runs a step in the stream where it will be recorded, so that its libraries have their memory there."""
        assert self.stream is not None
        current = torch.cuda.current_stream()
        self._wait(self.stream)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            output = step()
        current.wait_stream(self.stream)
        return self._taken(output, current)

    def record(self, step: Step) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Records what a step does, without doing it; the graph, and where a replay leaves the step's output."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile.
        with torch.cuda.graph(graph, self._pool, self.stream, capture_error_mode="thread_local"):
            output = step()
        return graph, output

    def replay(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor | None) -> torch.Tensor:
        """Replays a graph in the current stream; its output in memory of its own."""
        assert output is not None
        current = torch.cuda.current_stream()
        self._wait(current)
        graph.replay()
        return self._taken(output, current)

    def _wait(self, stream: torch.cuda.Stream) -> None:
        if self._done is not None:
            stream.wait_event(self._done)

    def _taken(self, output: torch.Tensor, current: torch.cuda.Stream) -> torch.Tensor:
        taken = output.clone()
        self._done = self._done or torch.cuda.Event()
        self._done.record(current)
        return taken
