"""Every metric of spray: name, meaning, labels. Observed where the work happens, served by `workers.exporter`.

On Ray, all processes of a node write to files in one folder, so that the node answers with the sum of them; elsewhere
they stay in the process. Labels are bounded: `replica` is Serve's number of the gang among those of its model, which
changes when another stops.

`RankMetrics`, `GangMetrics` and `GatewayMetrics` hold what one process observes. They are made before it serves: from
then on no file is opened any more, so that observing raises nothing, and every series begins at zero.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

logger = logging.getLogger("ray.serve")


def _folder() -> Path | None:
    """Where the processes of this node and cluster keep their values; None outside Ray's worker processes."""
    raylet = os.environ.get("RAY_RAYLET_PID")
    if raylet is None:
        return None
    folder = Path(os.environ.get("SPRAY_METRICS_DIR", f"{tempfile.gettempdir()}/spray-metrics-{raylet}"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(f"gauge_*_{os.getpid()}.db"):  # of a process before this one, with the same number
            file.unlink()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        logger.warning("this process exports no metrics: %s: %s", folder, error.strerror)
        return None
    if "prometheus_client" in sys.modules:  # it has looked for the variable already
        logger.warning("this process exports no metrics: prometheus_client was imported before workers.metrics")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # not of the whole node: Ray's own processes read it too
    return folder


FOLDER = _folder()

from prometheus_client import Counter, Gauge, Histogram  # noqa: E402

STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
STAGE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)

STEP_SECONDS = Histogram(
    "spray_step_seconds", "One denoising step on one rank.", ["model", "replica", "rank"], buckets=STEP_BUCKETS
)
STAGE_SECONDS = Histogram(
    "spray_stage_seconds",
    "One stage of a request on one rank: encode, denoise or decode.",
    ["model", "replica", "rank", "stage"],
    buckets=STAGE_BUCKETS,
)
RANK_MEMORY = Gauge(
    "spray_rank_memory_peak_bytes",
    "The most memory that a rank has reserved: torch's on its GPU, or its process's on CPU.",
    ["model", "replica", "rank"],
    multiprocess_mode="livemostrecent",
)

GANG_STARTUP_SECONDS = Histogram(
    "spray_gang_startup_seconds",
    "From the start of a gang's ranks, or of their successors, until they serve.",
    ["model"],
    buckets=STAGE_BUCKETS,
)
GANG_LOSSES = Counter("spray_gang_losses", "Times that a gang lost its ranks.", ["model"])
GANG_BACKLOG = Gauge(
    "spray_gang_backlog_seconds",
    "Seconds of work left of the request that a gang runs, by its own estimate.",
    ["model", "replica"],
    multiprocess_mode="livemostrecent",
)

REQUESTS = Counter(
    "spray_requests", "Requests that have ended in a gateway: ok, cancelled, or the error.", ["model", "outcome"]
)
REQUEST_SECONDS = Histogram(
    "spray_request_seconds", "An answered request, from admission to its result.", ["model"], buckets=STAGE_BUCKETS
)
QUEUE_SECONDS = Histogram(
    "spray_queue_seconds",
    "What of an answered request was no computation of the gang that answered: mostly waiting for it.",
    ["model"],
    buckets=STAGE_BUCKETS,
)
REQUEST_LOSSES = Counter("spray_request_losses", "Times that a request lost its gang; it runs again.", ["model"])
IN_FLIGHT = Gauge("spray_requests_in_flight", "Requests that wait or run.", ["model"], multiprocess_mode="livesum")
QUEUED = Gauge("spray_requests_queued", "Requests that wait for a gang.", ["model"], multiprocess_mode="livesum")
GANGS = Gauge(
    "spray_gangs",
    "Gangs by Serve's state, as each gateway sees them.",
    ["model", "state"],
    multiprocess_mode="livemostrecent",
)

BUILD = Gauge("spray_build_info", "1 where spray runs.", ["version"], multiprocess_mode="livemostrecent")


Stage = Literal["encode", "denoise", "decode"]
STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode")


class RankMetrics:
    """What one rank observes."""

    def __init__(self, model: str, replica: str, rank: int) -> None:
        labels = model, replica, str(rank)
        self._step = STEP_SECONDS.labels(*labels)
        self._stages = {stage: STAGE_SECONDS.labels(*labels, stage) for stage in STAGES}
        self._memory = RANK_MEMORY.labels(*labels)

    def step(self, seconds: float) -> None:
        """One step is done."""
        self._step.observe(seconds)

    def stage(self, stage: Stage, seconds: float) -> None:
        """One stage of a request is done."""
        self._stages[stage].observe(seconds)

    def memory(self, size: int) -> None:
        """Bytes that the rank has reserved at most."""
        self._memory.set(size)


class GangMetrics:
    """What one gang observes."""

    def __init__(self, model: str, replica: str) -> None:
        self.replica = replica
        self._startup = GANG_STARTUP_SECONDS.labels(model)
        self._losses = GANG_LOSSES.labels(model)
        self._backlog = GANG_BACKLOG.labels(model, replica)

    def started(self, seconds: float) -> None:
        """Its ranks serve."""
        self._startup.observe(seconds)

    def lost(self) -> None:
        """Its ranks are lost."""
        self._losses.inc()

    def backlog(self, seconds: float) -> None:
        """What is left of its work."""
        self._backlog.set(seconds)


class GatewayMetrics:
    """What one gateway observes of one model.

    Args:
        outcomes: how a request can end.
    """

    def __init__(self, model: str, outcomes: Iterable[str]) -> None:
        self._requests = {outcome: REQUESTS.labels(model, outcome) for outcome in outcomes}
        self._seconds, self._queue = REQUEST_SECONDS.labels(model), QUEUE_SECONDS.labels(model)
        self._losses, self._in_flight = REQUEST_LOSSES.labels(model), IN_FLIGHT.labels(model)

    def began(self) -> None:
        """A request has come."""
        self._in_flight.inc()

    def ended(self, outcome: str) -> None:
        """It is gone, however it went."""
        self._in_flight.dec()
        self._requests[outcome].inc()

    def answered(self, seconds: float, computed: float) -> None:
        """It has its result, after so many seconds, of which the gang computed for some."""
        self._seconds.observe(seconds)
        self._queue.observe(max(0.0, seconds - computed))

    def lost(self) -> None:
        """Its gang was lost."""
        self._losses.inc()
