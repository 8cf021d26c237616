"""Every metric of spray: name, meaning, labels. Observed where the work happens, served by `workers.exporter`.

On Ray, all processes of a node write to files in one folder, so that the node answers with the sum of them; elsewhere
they stay in the process. Labels are bounded: `replica` is Serve's number of the gang, used again after a restart.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path


def _folder() -> Path | None:
    """Where the processes of this node and cluster keep their values; None outside Ray's worker processes."""
    raylet = os.environ.get("RAY_RAYLET_PID")
    if raylet is None:
        return None
    return Path(os.environ.get("SPRAY_METRICS_DIR", f"{tempfile.gettempdir()}/spray-metrics-{raylet}"))


FOLDER = _folder()
if FOLDER is not None:
    if "prometheus_client" in sys.modules:  # it reads the variable when it is imported
        logging.getLogger("ray.serve").warning("prometheus_client was imported before: no metrics of this process")
    FOLDER.mkdir(parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(FOLDER)  # not of the whole node: Ray's own processes read it too

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
    "The most memory that a rank has held: of its GPU, or of its process on CPU.",
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
    "spray_requests", "Requests that have ended in a gateway: ok, or the code of the error.", ["model", "outcome"]
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
