"""What the collectives of one rank send, and how long a step spends in them.

`collectives` and `mesh` count here; `workers.model.denoising` marks the begin and end of a step, and
`workers.gang.rank` reads the counts. Bytes are always counted, as sent: a message to oneself counts as none, a sum as
much as the best algorithm sends.

Seconds are those in which computation had to wait: on a CPU by the clock, on a GPU by events in the computing stream.
They contain the transfer and the wait for slower peers. A step has hundreds of calls, so only a sample of the steps is
timed, the same on all ranks.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, get_args

import torch

Op = Literal["all_to_all", "ring", "all_reduce", "broadcast", "gather"]
OPS: tuple[Op, ...] = get_args(Op)

STEPS_PER_TIMED = 13
"""One of this many steps is timed."""


def is_sampled(name: str, step: int) -> bool:
    """Whether a step of the request with this name is timed by default.

    All ranks of the request decide alike, whatever they have done before. Each request times other steps, so that first
    steps, which may compile, count no more than others.
    """
    return (zlib.crc32(name.encode()) + step) % STEPS_PER_TIMED == 0


class InCollectives:
    """How long one step was in collectives, by the clock. It keeps only sums, because a list that grows between the
    tensors of a step slows down their allocation."""

    def __init__(self) -> None:
        self._seconds: dict[Op, float] = dict.fromkeys(OPS, 0.0)
        self._op: Op = "all_to_all"
        self._begun = 0.0

    def begin(self, op: Op) -> None:
        """Note that a collective of this kind begins."""
        self._op, self._begun = op, perf_counter()

    def end(self) -> None:
        """Note that it has ended, or that the computing stream waits for its end."""
        self._seconds[self._op] += perf_counter() - self._begun

    def seconds(self) -> dict[Op, float]:
        """Seconds by kind of collective. On a GPU, call it only after waiting for the end of the step."""
        return {op: seconds for op, seconds in self._seconds.items() if seconds}


class InCollectivesOnCuda(InCollectives):
    """The same by events in the computing stream. The result is known when the step has ended there.

    Args:
        events: a pool of free events. They are recorded again, and returned to it.
    """

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self._events = events
        self._marks: list[tuple[Op, Any]] = []  # begin and end of each call, in turn

    def begin(self, op: Op) -> None:
        """See `InCollectives.begin`."""
        self._op = op
        self._mark()

    def end(self) -> None:
        """See `InCollectives.end`."""
        self._mark()

    def seconds(self) -> dict[Op, float]:
        """See `InCollectives.seconds`."""
        for (op, begin), (_, end) in zip(self._marks[::2], self._marks[1::2], strict=True):
            self._seconds[op] += begin.elapsed_time(end) / 1e3
        self._events += [event for _, event in self._marks]
        self._marks = []
        return super().seconds()

    def _mark(self) -> None:
        event = self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((self._op, event))


@dataclass(slots=True)
class Sent:
    """Bytes by kind of collective. Attributes, because adding to an entry of a dict takes twice as long."""

    all_to_all: float = 0
    ring: float = 0
    all_reduce: float = 0
    broadcast: float = 0
    gather: float = 0


class Traffic:
    """The counts of one rank, shared by its mesh and all axes.

    Args:
        on_cuda: whether collectives are queued on a GPU.

    Attributes:
        sent: bytes sent to other ranks since the last `take_sent`. Senders add to it in place.
        timing: the times of the running step; None: it is not timed.
    """

    def __init__(self, on_cuda: bool = False) -> None:
        self.sent = Sent()
        self.timing: InCollectives | None = None
        self._on_cuda = on_cuda
        self._events: list[Any] = []
        self._broadcasts: list[float] = []

    @contextmanager
    def step(self, timed: bool) -> Iterator[InCollectives | None]:
        """One step, in which collectives may be timed. All ranks must pass the same `timed`."""
        if timed:
            self.timing = InCollectivesOnCuda(self._events) if self._on_cuda else InCollectives()
        try:
            yield self.timing
        finally:
            self.timing = None

    def broadcast(self, sent: float, seconds: float) -> None:
        """Note a broadcast of host bytes, timed by the clock. These are outside of steps."""
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
