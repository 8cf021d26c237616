"""What the collectives of one rank send, and how long a step is in them.

`collectives` and `mesh` count here; `workers.model.denoising` says where a step begins and ends, and
`workers.gang.rank` reads. Bytes are counted always, as they are sent: of a message to oneself none, of a sum what the
best algorithm sends.

Seconds are those in which computation had to wait: on a CPU by the clock, on a GPU by events in the stream that
computes. They hold the transfer and the wait for slower peers. A step has hundreds of calls, so only a sample of the
steps is timed, the same on all ranks.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, get_args

import torch

Op = Literal["all_to_all", "ring", "all_reduce", "broadcast", "gather"]
OPS: tuple[Op, ...] = get_args(Op)

STEPS_PER_TIMED = 13
"""Of so many steps one is timed."""


def is_sampled(name: str, step: int) -> bool:
    """Whether a step of a request of this name is timed, if nobody asks for it.

    The ranks that take it decide alike, whatever they have done before. It is another step of each request: a first
    one, which may compile, counts no more than others.
    """
    return (zlib.crc32(name.encode()) + step) % STEPS_PER_TIMED == 0


class InCollectives:
    """When one step was in collectives. A GPU knows it when the step has ended there.

    Args:
        events: of CUDA, which nobody needs anymore; they are recorded anew, and come back. None: by the clock.
    """

    def __init__(self, events: list[Any] | None = None) -> None:
        self._events = events
        self._now: Callable[[], Any] = perf_counter if events is None else self._event
        self._ops: list[Op] = []
        self._begins: list[Any] = []
        self._ends: list[Any] = []
        self._seconds: dict[Op, float] = {}

    def begin(self, op: Op) -> None:
        """A collective of this kind begins."""
        self._ops.append(op)
        self._begins.append(self._now())

    def end(self) -> None:
        """It has ended, or the stream that computes waits for its end."""
        self._ends.append(self._now())

    def seconds(self) -> dict[Op, float]:
        """By kind of collective. On a GPU call it only after the end of the step was waited for."""
        for op, begin, end in zip(self._ops, self._begins, self._ends, strict=True):
            took = end - begin if self._events is None else begin.elapsed_time(end) / 1e3
            self._seconds[op] = self._seconds.get(op, 0.0) + took
        if self._events is not None:
            self._events += self._begins + self._ends
        self._ops, self._begins, self._ends = [], [], []
        return dict(self._seconds)

    def _event(self) -> Any:
        assert self._events is not None
        event = self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(slots=True)
class Sent:
    """Bytes by kind of collective. Attributes, because adding to one of a dict takes twice as long."""

    all_to_all: float = 0
    ring: float = 0
    all_reduce: float = 0
    broadcast: float = 0
    gather: float = 0


class Traffic:
    """Counts for one rank. Its mesh and all axes of it have the same.

    Args:
        on_cuda: collectives are queued on a GPU.

    Attributes:
        sent: bytes to other ranks, since they were taken. Whoever sends adds to it in place.
        timing: of the step that runs; None: it is not timed.
    """

    def __init__(self, on_cuda: bool = False) -> None:
        self.sent = Sent()
        self.timing: InCollectives | None = None
        self._events: list[Any] | None = [] if on_cuda else None
        self._broadcasts: list[float] = []

    @contextmanager
    def step(self, timed: bool) -> Iterator[InCollectives | None]:
        """One step, in which collectives are timed, or not. All ranks must begin it alike."""
        self.timing = InCollectives(self._events) if timed else None
        try:
            yield self.timing
        finally:
            self.timing = None

    def broadcast(self, sent: float, seconds: float) -> None:
        """A broadcast of host bytes has ended, by the clock. Those are outside of steps."""
        self.sent.broadcast += sent
        self._broadcasts.append(seconds)

    def take_sent(self) -> dict[Op, float]:
        """Bytes sent since the last call, by kind of collective."""
        taken, self.sent = self.sent, Sent()
        return {op: size for op in OPS if (size := getattr(taken, op))}

    def take_broadcasts(self) -> list[float]:
        """Seconds of each broadcast since the last call."""
        taken, self._broadcasts = self._broadcasts, []
        return taken

    def forget(self) -> None:
        """Forget what was counted until now."""
        self.take_sent()
        self.take_broadcasts()
