"""Events of a pretended GPU, and copies to the host that nobody waits for: they arrive when an event after them does.

So a value that is read too early is the one from before, as it may be on a GPU.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from tests.support.fake_cuda.seen import Seen


class Queue:
    """What the device has still to do for the host."""

    def __init__(self) -> None:
        self._copies: list[Callable[[], object]] = []
        self._done = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of what `source` is now."""
        now = source.clone()
        self._copies.append(lambda: target.copy_(now))

    def length(self) -> int:
        """How many copies were ever queued."""
        return len(self._copies)

    def run(self, length: int) -> None:
        """Do those that were queued first."""
        for copy in self._copies[self._done : length]:
            copy()
        self._done = max(self._done, length)


def event_class(queue: Queue, seen: Seen) -> type:
    """What stands for `torch.cuda.Event`."""

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.at, self.length, self.timed = 0.0, 0, enable_timing

        def record(self, *_: Any) -> None:
            self.at, self.length = time.perf_counter(), queue.length()

        def synchronize(self) -> None:
            seen.wait("waits for an event")
            queue.run(self.length)

        def elapsed_time(self, end: "Event") -> float:
            if not (self.timed and end.timed):
                raise RuntimeError("both events must be created with enable_timing=True")
            return 1e3 * (end.at - self.at)

    return Event
