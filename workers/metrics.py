"""Every metric of spray: name, meaning, labels. Observed where the work happens, served by `workers.exporter`.

This module only declares them. Values stay in the process unless it has called `workers.exporter.share_values`.
Labels are bounded: `replica` is Serve's number of the gang among those of its model, which may change when another
gang stops.

`RankMetrics`, `GangMetrics` and `GatewayMetrics` hold what one process observes. Make them before it serves: that
opens all files, so that observing raises nothing, and every series begins at zero.
"""

from collections.abc import Iterable
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram

STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
STAGE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)

STEP_SECONDS = Histogram(
    "spray_step_seconds", "One denoising step on one rank.", ["model", "replica", "rank"], buckets=STEP_BUCKETS
)
STAGE_SECONDS = Histogram(
    "spray_stage_seconds",
    "One stage of a request on one rank: encode, denoise or decode; encode_media on the first.",
    ["model", "replica", "rank", "stage"],
    buckets=STAGE_BUCKETS,
)
RANK_MEMORY = Gauge(
    "spray_rank_memory_peak_bytes",
    "Peak memory of a rank: what torch has reserved on its GPU, or what its process has used on CPU.",
    ["model", "replica", "rank"],
    multiprocess_mode="livemostrecent",
)

GANG_STARTUP_SECONDS = Histogram(
    "spray_gang_startup_seconds",
    "From the start of a gang's ranks, or of their replacements, until they serve.",
    ["model"],
    buckets=STAGE_BUCKETS,
)
GANG_LOSSES = Counter("spray_gang_losses", "Times a gang lost its ranks.", ["model"])
GANG_BACKLOG = Gauge(
    "spray_gang_backlog_seconds",
    "Seconds of work left in the request that a gang runs, by the gang's own estimate.",
    ["model", "replica"],
    multiprocess_mode="livemostrecent",
)

REQUESTS = Counter(
    "spray_requests",
    "Requests that a gateway has finished, by outcome: ok, cancelled, or the error code.",
    ["model", "outcome"],
)
REQUEST_SECONDS = Histogram(
    "spray_request_seconds", "An answered request, from admission to result.", ["model"], buckets=STAGE_BUCKETS
)
QUEUE_SECONDS = Histogram(
    "spray_queue_seconds",
    "The part of an answered request in which the answering gang did not compute: mostly the wait for a gang.",
    ["model"],
    buckets=STAGE_BUCKETS,
)
REQUEST_LOSSES = Counter("spray_request_losses", "Times a request lost its gang and ran again.", ["model"])
IN_FLIGHT = Gauge("spray_requests_in_flight", "Requests that wait or run now.", ["model"], multiprocess_mode="livesum")
QUEUED = Gauge("spray_requests_queued", "Requests that wait for a gang now.", ["model"], multiprocess_mode="livesum")
GANGS = Gauge(
    "spray_gangs",
    "Gangs by Serve's replica state, as each gateway sees them.",
    ["model", "state"],
    multiprocess_mode="livemostrecent",
)

BUILD = Gauge(
    "spray_build_info", "Always 1; the label has the version.", ["version"], multiprocess_mode="livemostrecent"
)


Stage = Literal["encode", "denoise", "decode", "encode_media"]
STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode", "encode_media")


class RankMetrics:
    """What one rank observes."""

    def __init__(self, model: str, replica: str, rank: int) -> None:
        labels = model, replica, str(rank)
        self._step = STEP_SECONDS.labels(*labels)
        self._stages = {stage: STAGE_SECONDS.labels(*labels, stage) for stage in STAGES}
        self._memory = RANK_MEMORY.labels(*labels)

    def step(self, seconds: float) -> None:
        """Count one denoising step."""
        self._step.observe(seconds)

    def stage(self, stage: Stage, seconds: float) -> None:
        """Count one stage of a request."""
        self._stages[stage].observe(seconds)

    def memory(self, size: int) -> None:
        """Set the rank's peak, in bytes."""
        self._memory.set(size)


class GangMetrics:
    """What one gang observes."""

    def __init__(self, model: str, replica: str) -> None:
        self.replica = replica
        self._startup = GANG_STARTUP_SECONDS.labels(model)
        self._losses = GANG_LOSSES.labels(model)
        self._backlog = GANG_BACKLOG.labels(model, replica)

    def started(self, seconds: float) -> None:
        """Count a start of its ranks that took this many seconds."""
        self._startup.observe(seconds)

    def lost(self) -> None:
        """Count a loss of its ranks."""
        self._losses.inc()

    def backlog(self, seconds: float) -> None:
        """Set the seconds of work that it has left."""
        self._backlog.set(seconds)


class GatewayMetrics:
    """What one gateway observes of one model.

    Args:
        outcomes: every way a request can end.
    """

    def __init__(self, model: str, outcomes: Iterable[str]) -> None:
        self._requests = {outcome: REQUESTS.labels(model, outcome) for outcome in outcomes}
        self._seconds, self._queue = REQUEST_SECONDS.labels(model), QUEUE_SECONDS.labels(model)
        self._losses, self._in_flight = REQUEST_LOSSES.labels(model), IN_FLIGHT.labels(model)

    def began(self) -> None:
        """Count a request that was admitted."""
        self._in_flight.inc()

    def ended(self, outcome: str) -> None:
        """Count its end, whatever the outcome."""
        self._in_flight.dec()
        self._requests[outcome].inc()

    def answered(self, seconds: float, computed: float) -> None:
        """Count its result, which came after `seconds`; the gang spent `computed` of them computing."""
        self._seconds.observe(seconds)
        self._queue.observe(max(0.0, seconds - computed))

    def lost(self) -> None:
        """Count that it lost its gang."""
        self._losses.inc()
