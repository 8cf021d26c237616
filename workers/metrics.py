"""Every metric of spray: name, meaning, labels. Observed where the work happens, served by `workers.exporter`.

This module only declares them; `workers.observing` holds what one process observes. Values stay in the process unless
it has called `workers.exporter.share_values`. Labels are bounded: `replica` is Serve's number of the gang among those
of its model, which may change when another gang stops; `shape` is made by `workers.shapes`; the others are words of a
list, or names from the deployment file.
"""

from typing import Literal

from prometheus_client import Counter, Gauge, Histogram

STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
STAGE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
PART_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
"""Of parts of a step."""

RANK = ("model", "replica", "rank")
GANG = ("model", "replica")

STEP_SECONDS = Histogram(
    "spray_step_seconds", "One denoising step on one rank.", [*RANK, "layout", "shape"], buckets=STEP_BUCKETS
)
COLLECTIVE_SECONDS = Histogram(
    "spray_collective_seconds",
    "What a sampled step of a rank waited in its collectives of one kind; of broadcast, one call outside of steps.",
    [*RANK, "op"],
    buckets=PART_BUCKETS,
)
COLLECTIVE_BYTES = Counter(
    "spray_collective_bytes", "Bytes that a rank has sent to others in its collectives, of every step.", [*RANK, "op"]
)
RANK_IDLE_SECONDS = Counter(
    "spray_rank_idle_seconds", "Seconds of ranks of elastic gangs that had no request, summed over ranks.", GANG
)
ELASTIC_CHANGES = Counter(
    "spray_elastic_changes",
    "Times that a request of an elastic gang took other ranks, or stood still because others needed them.",
    [*GANG, "kind"],
)
STRAGGLER_SECONDS = Histogram(
    "spray_straggler_seconds",
    "What a sampled step of a rank waited for slower ranks: its time in collectives less the least of all ranks.",
    RANK,
    buckets=PART_BUCKETS,
)
STAGE_SECONDS = Histogram(
    "spray_stage_seconds",
    "One stage of a request on one rank; queue is the part of an answered request in which no gang computed it.",
    [*RANK, "stage"],
    buckets=STAGE_BUCKETS,
)
STEPS = Counter("spray_steps", "Denoising steps of requests, however many ranks took part.", ["model", "replica"])
PIXELS = Counter("spray_pixels", "Pixels of drawn pictures and of all frames of videos.", ["model", "replica"])
PROMPT_TOKENS = Counter(
    "spray_prompt_tokens", "Tokens that text encoders have read, of prompts and negative ones.", ["model", "replica"]
)
RANK_MEMORY = Gauge(
    "spray_rank_memory_bytes",
    "Memory of a rank, after its latest request: torch's on its GPU, or that of its process on CPU.",
    [*RANK, "kind"],
    multiprocess_mode="livemostrecent",
)

GANG_START_SECONDS = Histogram(
    "spray_gang_start_seconds",
    "One phase of the start of a gang's ranks, or of their replacements.",
    ["model", "phase"],
    buckets=STAGE_BUCKETS,
)
GANG_RESTARTS = Counter("spray_gang_restarts", "Times a gang lost its ranks, by reason.", ["model", "reason"])
BACKLOG = Gauge(
    "spray_backlog_seconds",
    "Seconds of work: left in the request that a gang runs; without replica, waiting in the gateways of the node.",
    ["model", "replica"],
    multiprocess_mode="livesum",
)
CAPACITY = Gauge(
    "spray_capacity_seconds",
    "Seconds of work that a gang finishes in a second: 1, or 0 while its ranks are replaced, or the share that lives.",
    ["model", "replica"],
    multiprocess_mode="livemostrecent",
)
PROGRESS = Gauge(
    "spray_progress_timestamp_seconds",
    "When a gang was last seen to be idle, or to pass a boundary of a request; seconds since the epoch.",
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
REQUEST_LOSSES = Counter("spray_request_losses", "Times a request lost its gang and ran again.", ["model"])
IN_FLIGHT = Gauge("spray_requests_in_flight", "Requests that wait or run now.", ["model"], multiprocess_mode="livesum")
QUEUED = Gauge(
    "spray_requests_queued", "Requests and jobs that wait for a gang now.", ["model"], multiprocess_mode="livesum"
)
GANGS = Gauge(
    "spray_gangs",
    "Gangs by Serve's replica state, as each gateway sees them.",
    ["model", "state"],
    multiprocess_mode="livemostrecent",
)
GANGS_WANTED = Gauge(
    "spray_gangs_wanted",
    "Gangs that Serve aims at, under the reason for that number; as each gateway sees it.",
    ["model", "reason"],
    multiprocess_mode="livemostrecent",
)
GANGS_LIMIT = Gauge(
    "spray_gangs_limit",
    "The fewest and the most gangs of a model, by its autoscaling.",
    ["model", "bound"],
    multiprocess_mode="livemostrecent",
)
TARGET_BACKLOG = Gauge(
    "spray_target_backlog_seconds",
    "Seconds that a request should wait at most, by the model's autoscaling.",
    ["model"],
    multiprocess_mode="livemostrecent",
)
JOBS = Gauge(
    "spray_jobs",
    "Jobs that have not ended, queued or running, as each gateway sees them.",
    ["model", "state"],
    multiprocess_mode="livemostrecent",
)
JOBS_ENDED = Gauge(
    "spray_jobs_ended",
    "Jobs that have ended since their store was made, by how, as each gateway sees them. It only grows.",
    ["model", "state"],
    multiprocess_mode="livemostrecent",
)
JOB_STORE_SECONDS = Histogram(
    "spray_job_store_seconds",
    "A call of the store of jobs, its retries included.",
    ["operation"],
    buckets=STAGE_BUCKETS,
)
JOB_STORE_ERRORS = Counter("spray_job_store_errors", "Calls that the store of jobs did not answer.", ["operation"])
WEBHOOKS = Counter("spray_webhooks", "Attempts to tell a caller of the end of a job.", ["outcome"])
API_REQUESTS = Counter(
    "spray_api_requests",
    "Calls of the API by route or RPC, status, and the name of the caller's key.",
    ["route", "code", "key"],
)
API_SECONDS = Histogram(
    "spray_api_seconds", "A call of the API, to the end of its answer.", ["route"], buckets=STAGE_BUCKETS
)

DISK_FREE = Gauge(
    "spray_disk_free_bytes",
    "Free bytes where the node keeps a kind of files.",
    ["folder"],
    multiprocess_mode="livemostrecent",
)
DISK_SIZE = Gauge(
    "spray_disk_size_bytes",
    "All bytes where the node keeps a kind of files.",
    ["folder"],
    multiprocess_mode="livemostrecent",
)
BUILD = Gauge(
    "spray_build_info", "Always 1; the label has the version.", ["version"], multiprocess_mode="livemostrecent"
)

Stage = Literal["queue", "encode", "prepare", "denoise", "decode", "encode_media"]
StartPhase = Literal["place", "fetch", "process", "rendezvous", "load", "self_test", "compile", "warm_up"]
MemoryKind = Literal["used", "peak", "limit"]
Loss = Literal["died", "silent", "stuck", "encoding", "out_of_memory", "error"]
"""Why the ranks of a gang are lost: the process of one is dead or stopped; one does not answer; one passes no boundary;
its files take too long; too little memory; anything else that a forward raises."""
WantedReason = Literal["minimum", "load", "maximum", "fixed"]
