"""What the collectives of one rank send, and how long a step is in them.

`collectives` and `mesh` count here; `workers.model.denoising` says where a step begins and ends, and
`workers.gang.rank` reads. Bytes are counted always, as they are sent: of a message to oneself none, of a sum what the
best algorithm sends.

Seconds are those in which computation had to wait: on a CPU by the clock, on a GPU by events in the stream that
computes. They hold the transfer and the wait for slower peers. An event costs the host microseconds, so on a GPU one
step of `CUDA_STEPS_PER_TIMED` is timed, the same on all ranks. What torch.compile has traced (the sums of tensor
parallelism in compiled blocks) is one call for Python: it is neither counted nor timed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal, get_args

import torch

Op = Literal["all_to_all", "ring", "all_reduce", "broadcast", "gather"]
OPS: tuple[Op, ...] = get_args(Op)

CUDA_STEPS_PER_TIMED = 13
"""A prime, so that it is another step of each request: the first one compiles and allocates."""


def _untimed() -> None:
    """What begins a collective that is not timed."""


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class InCollectives:
    """How long one step was in collectives. A GPU knows it when the step has ended there.

    Attributes:
        by_clock: seconds by kind; added to in place, because a step has hundreds of calls.
    """

    def __init__(self) -> None:
        self.by_clock = dict.fromkeys(OPS, 0.0)
        self._by_events: list[tuple[Op, Any, Any]] = []

    def add_events(self, op: Op, begin: Any, end: Any) -> None:
        """One call, between two events."""
        self._by_events.append((op, begin, end))

    def seconds(self) -> dict[Op, float]:
        """By kind of collective. On a GPU call it only after the end of the step was waited for."""
        for op, begin, end in self._by_events:
            self.by_clock[op] += begin.elapsed_time(end) / 1e3
        self._by_events.clear()
        return {op: seconds for op, seconds in self.by_clock.items() if seconds}


class Traffic:
    """Counts for one rank. Its mesh and all axes of it have the same.

    Args:
        on_cuda: collectives are queued on a GPU.
        steps_per_timed: of so many steps one is timed; None: all on a CPU, `CUDA_STEPS_PER_TIMED` on a GPU.

    Attributes:
        begin: a collective begins. Give what it returns to `end`. On a CPU it is the clock itself, because a step has
            hundreds of calls.
    """

    def __init__(self, on_cuda: bool = False, steps_per_timed: int | None = None) -> None:
        self._on_cuda = on_cuda
        self._steps_per_timed = steps_per_timed or (CUDA_STEPS_PER_TIMED if on_cuda else 1)
        self._steps = 0
        self._timing: InCollectives | None = None
        self.begin: Callable[[], Any] = _untimed
        self._sent: dict[Op, float] = dict.fromkeys(OPS, 0.0)
        self._broadcasts: list[float] = []

    @contextmanager
    def step(self, timed: bool = False) -> Iterator[InCollectives | None]:
        """One step, in which collectives are timed; None where this one is not. All ranks must begin it alike.

        Args:
            timed: this one is in any case.
        """
        self._steps += 1
        if timed or self._steps % self._steps_per_timed == 0:
            self._timing, self.begin = InCollectives(), _event if self._on_cuda else perf_counter
        try:
            yield self._timing
        finally:
            self._timing, self.begin = None, _untimed

    def end(self, op: Op, sent: float, begun: Any) -> None:
        """It has ended, or the stream that computes waits for its end.

        Args:
            op: its kind.
            sent: bytes that this rank has sent to others.
            begun: what `begin` returned.
        """
        self._sent[op] += sent
        if begun is None or (timing := self._timing) is None:
            return
        if self._on_cuda:
            timing.add_events(op, begun, _event())
        else:
            timing.by_clock[op] += perf_counter() - begun

    def broadcast(self, sent: float, seconds: float) -> None:
        """A broadcast of host bytes has ended, by the clock. Those are outside of steps."""
        self._sent["broadcast"] += sent
        self._broadcasts.append(seconds)

    def take_sent(self) -> dict[Op, float]:
        """Bytes sent since the last call, by kind of collective."""
        taken, self._sent = self._sent, dict.fromkeys(OPS, 0.0)
        return {op: size for op, size in taken.items() if size}

    def take_broadcasts(self) -> list[float]:
        """Seconds of each broadcast since the last call."""
        taken, self._broadcasts = self._broadcasts, []
        return taken

    def forget(self) -> None:
        """Forget what was counted until now."""
        self.take_sent()
        self.take_broadcasts()
