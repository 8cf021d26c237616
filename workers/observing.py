"""What one process observes, under its labels: a rank, a gang, a gateway for one model.

Made before the process serves: that opens all files, so that observing raises nothing, and every series begins at zero.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from workers.metrics import (
    BACKLOG,
    CAPACITY,
    COLLECTIVE_BYTES,
    COLLECTIVE_SECONDS,
    ELASTIC_CHANGES,
    GANG_RESTARTS,
    GANG_START_SECONDS,
    IN_FLIGHT,
    PIXELS,
    PROGRESS,
    PROMPT_TOKENS,
    RANK_IDLE_SECONDS,
    RANK_MEMORY,
    REQUEST_LOSSES,
    REQUEST_SECONDS,
    REQUESTS,
    STAGE_SECONDS,
    STEP_SECONDS,
    STEPS,
    STRAGGLER_SECONDS,
    Loss,
    MemoryKind,
    Stage,
    StartPhase,
)

if TYPE_CHECKING:  # gangs and gateways import this, and must start fast without torch
    from sp_core.traffic import Op, Traffic

GONE = math.nan
"""A gauge that is set to it tells nothing: what it told of has ended, and its process has not."""

RANK_STAGES: tuple[Stage, ...] = ("encode", "prepare", "denoise", "decode", "encode_media")
MEMORY_KINDS: tuple[MemoryKind, ...] = get_args(MemoryKind)
LOSSES: tuple[Loss, ...] = get_args(Loss)


class RankMetrics:
    """What one rank observes.

    Args:
        model: its name.
        replica: the number of the gang.
        rank: the number of the rank.
        layout: of the gang, as the API says it; of an elastic one, that of the request.
        leads: whether it counts what all ranks of a request do alike; None: rank 0 does.
    """

    def __init__(self, model: str, replica: str, rank: int, layout: str = "", leads: bool | None = None) -> None:
        self._labels = model, replica, str(rank)
        self._layout = layout
        self._steps: dict[str, Any] = {}  # by shape
        self._collectives: dict[Op, Any] = {}
        self._bytes: dict[Op, Any] = {}
        self._straggler = STRAGGLER_SECONDS.labels(*self._labels)
        self._stages = {stage: STAGE_SECONDS.labels(*self._labels, stage) for stage in RANK_STAGES}
        self._memory = {kind: RANK_MEMORY.labels(*self._labels, kind) for kind in MEMORY_KINDS}
        self._counts = [
            metric.labels(model, replica) if (rank == 0 if leads is None else leads) else None
            for metric in (STEPS, PIXELS, PROMPT_TOKENS)
        ]

    def step(self, seconds: float, shape: str) -> None:
        """Count one denoising step."""
        if shape not in self._steps:
            self._steps[shape] = STEP_SECONDS.labels(*self._labels, self._layout, shape)
        self._steps[shape].observe(seconds)
        if self._counts[0]:
            self._counts[0].inc()

    def in_collectives(self, seconds: "Mapping[Op, float] | None", waited: float) -> None:
        """Count what one step was in collectives, and how much of that it waited for slower ranks.

        A kind that was ever used counts in each step, so that the mean is one over all steps.

        Args:
            seconds: by kind; None or empty: not measured, or there is nothing to measure.
            waited: the seconds for slower ranks.
        """
        if not seconds:
            return
        for op in seconds:
            self._collective(op)
        for op, collective in self._collectives.items():
            if op != "broadcast":
                collective.observe(seconds.get(op, 0.0))
        self._straggler.observe(waited)

    def traffic(self, traffic: "Traffic") -> None:
        """Count what this rank has sent and broadcast since the last call."""
        self.sent(traffic.take_sent())
        for seconds in traffic.take_broadcasts():
            self.broadcast(seconds)

    def broadcast(self, seconds: float) -> None:
        """Count one broadcast."""
        self._collective("broadcast").observe(seconds)

    def sent(self, sizes: "Mapping[Op, float]") -> None:
        """Count bytes that this rank has sent."""
        for op, size in sizes.items():
            if op not in self._bytes:
                self._bytes[op] = COLLECTIVE_BYTES.labels(*self._labels, op)
            self._bytes[op].inc(size)

    def stage(self, stage: Stage, seconds: float) -> None:
        """Count one stage of a request."""
        self._stages[stage].observe(seconds)

    def drew(self, pixels: int, prompt_tokens: int) -> None:
        """Count what one request has drawn and read. Rank 0 does; the others draw the same."""
        for counter, amount in zip(self._counts[1:], (pixels, prompt_tokens), strict=True):
            if counter:
                counter.inc(amount)

    def memory(self, **sizes: float) -> None:
        """Set sizes in bytes by kind: used, peak, limit."""
        for kind in MEMORY_KINDS:
            self._memory[kind].set(sizes[kind])

    def end(self) -> None:
        """Nothing is observed under these labels anymore."""
        self.memory(**dict.fromkeys(MEMORY_KINDS, GONE))

    def _collective(self, op: "Op") -> Any:
        if op not in self._collectives:
            self._collectives[op] = COLLECTIVE_SECONDS.labels(*self._labels, op)
        return self._collectives[op]


class GangMetrics:
    """What one gang observes."""

    def __init__(self, model: str, replica: str) -> None:
        self.replica = replica
        self._model = model
        self._losses = {reason: GANG_RESTARTS.labels(model, reason) for reason in LOSSES}
        self._gauges = [gauge.labels(model, replica) for gauge in (BACKLOG, CAPACITY, PROGRESS)]

    def started(self, phases: Mapping[StartPhase, float]) -> None:
        """Count a start of its ranks: the seconds of each phase."""
        for phase, seconds in phases.items():
            GANG_START_SECONDS.labels(self._model, phase).observe(seconds)

    def lost(self, reason: Loss) -> None:
        """Count a loss of its ranks."""
        self._losses[reason].inc()

    def now(self, backlog_s: float, capacity: float, moved_at: float) -> None:
        """Set the seconds of work left, those that it does in a second, and when it was last seen to move."""
        for gauge, value in zip(self._gauges, (backlog_s, capacity, moved_at), strict=True):
            gauge.set(value)

    def elastic(self, idle_s: float, changes: "Mapping[str, int]") -> None:
        """Count, of an elastic gang, the seconds of ranks without work, and changes by kind, since the last call."""
        RANK_IDLE_SECONDS.labels(self._model, self.replica).inc(idle_s)
        for kind, count in changes.items():
            ELASTIC_CHANGES.labels(self._model, self.replica, kind).inc(count)

    def end(self) -> None:
        """Nothing is observed under this number anymore."""
        for gauge in self._gauges:
            gauge.set(GONE)


class GatewayMetrics:
    """What one gateway observes of one model.

    Args:
        outcomes: every way a request can end.
    """

    def __init__(self, model: str, outcomes: Iterable[str]) -> None:
        self._requests = {outcome: REQUESTS.labels(model, outcome) for outcome in outcomes}
        self._seconds, self._queue = REQUEST_SECONDS.labels(model), STAGE_SECONDS.labels(model, "", "", "queue")
        self._losses, self._in_flight = REQUEST_LOSSES.labels(model), IN_FLIGHT.labels(model)
        self._running, self._removed = 0, False
        self._in_flight.set(0)

    def began(self) -> None:
        """Count a request that was admitted."""
        self._running += 1
        self._tell()

    def ended(self, outcome: str) -> None:
        """Count its end, whatever the outcome."""
        self._running -= 1
        self._tell()
        self._requests[outcome].inc()

    def answered(self, seconds: float, computed: float) -> None:
        """Count its result, which came after `seconds`; the gang spent `computed` of them computing."""
        self._seconds.observe(seconds)
        self._queue.observe(max(0.0, seconds - computed))

    def lost(self) -> None:
        """Count that it lost its gang."""
        self._losses.inc()

    def serve(self, served: bool) -> None:
        """The deployment has the model, or has it no more: then its gauge vanishes with its last request."""
        self._removed = not served
        self._tell()

    def _tell(self) -> None:
        self._in_flight.set(GONE if self._removed and not self._running else self._running)
