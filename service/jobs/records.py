"""The record of a job, as the store keeps it and the API tells it. Frozen, picklable, without a database.

`NewJob` goes into `service.jobs.store`, `Job` comes out of it. Times are seconds since the epoch, by the clock of the
store: gateways need not agree on the time.
"""

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.messages import Priority as Priority  # jobs are where most need it

Kind = Literal["image", "video"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]

ENDED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled", "expired"})
"""States that are never left."""

HEAD_START_S: Mapping[Priority, float] = {"interactive": 0.0, "standard": 60.0, "batch": 600.0}
"""By how much a job must be older to come before an interactive one. So interactive work overtakes the rest, and what
has waited for long enough is overtaken by nobody."""

MOST_PAUSE_S, MOST_LEASE_S = 60.0, 600.0
"""Seconds: more than a job ever waits for its next attempt, and than a lease ever lasts. What is further ahead was
written before the clock was set back."""

MAX_ATTEMPTS = 3
MAX_GANG_LOSSES = 2
"""What one job may cost. Then it fails as QUARANTINED."""

ID = re.compile("job_[0-9a-f]{44}")
"""Of a job; see `new_id`."""

QUARANTINED = "request_quarantined"
DEADLINE = "deadline_exceeded"
CANCELLED = "cancelled"
UNSERVED = "model_not_found"


class LeaseLost(Exception):
    """The job is not this runner's anymore: it was cancelled or deleted, or another attempt runs it."""


class KeyReused(Exception):
    """The owner has used the idempotency key for another body."""


@dataclass(frozen=True)
class JobError:
    """Why a job did not succeed, in the words of the API's errors.

    Attributes:
        code: a stable word for programs.
        message: what went wrong.
        param: the field that is wrong; None: no single one.
    """

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class JobOutput:
    """One finished file of a job.

    Attributes:
        name: in the store of outputs.
        kind: its suffix, such as mp4.
        size: bytes.
        sha256: of the bytes, in hexadecimal.
        seed: draws the same again.
    """

    name: str
    kind: str
    size: int
    sha256: str
    seed: int


def new_id() -> str:
    """An id that nobody can guess. It begins with the time, in milliseconds, so that ids sort by age."""
    return f"job_{int(time.time() * 1000):012x}{secrets.token_hex(16)}"


@dataclass(frozen=True)
class NewJob:
    """What is submitted.

    Attributes:
        id: whoever submits again after a lost answer gets the same job.
        kind: what it makes.
        model: name of the model in the deployment.
        owner: name of the API key that asks; empty where none is needed.
        request: all of it as JSON, seed included: nothing is random after this.
        work: pixels x frames x pictures x the steps that are done: with `strength`, a share of those asked for.
        priority: see `HEAD_START_S`.
        deadline_s: seconds from now after which it is worth nothing; None: never.
        idempotency_key: the same key of the same owner is the same job; None: each call is a new one.
        fingerprint: of the body that came with the key.
        webhook_url: what is called when it has ended; None: nothing.
        input_data: what it begins with, in the order of the request, unless it lies in files.
    """

    kind: Kind
    model: str
    owner: str
    request: Mapping[str, Any]
    work: int
    id: str = field(default_factory=new_id)
    priority: Priority = "standard"
    deadline_s: float | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""
    webhook_url: str | None = None
    input_data: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        id: unguessable; sorts by time of submission.
        kind, model, owner, request, work, priority, idempotency_key, fingerprint, webhook_url: as submitted.
        state: where it is.
        created_at, started_at, ended_at: seconds; started_at is that of the last attempt. None: not yet.
        deadline_at: seconds; None: none.
        expires_at: when an ended job and its outputs are removed.
        fence: grows with each attempt; a runner with another one can change nothing.
        attempt: how often it was given to a runner; counted before the runner hears of it.
        gang_losses: how many gangs it has cost.
        runner: who has the lease, or had it last; empty before the first attempt.
        lease_until: when it is queued again if the runner says nothing; None: it does not run.
        not_before: it is not claimed earlier; 0 unless an attempt has failed.
        step, total_steps: of the attempt that runs or ran last; 0: it has not begun.
        error: why it did not succeed.
        outputs: files of a job that succeeded.
        metrics: what it took, as in the API's answers.
        warnings: what its caller should know.
    """

    id: str
    kind: Kind
    model: str
    owner: str
    request: Mapping[str, Any]
    work: int
    priority: Priority
    state: State
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    deadline_at: float | None = None
    expires_at: float | None = None
    fence: int = 0
    attempt: int = 0
    gang_losses: int = 0
    runner: str = ""
    lease_until: float | None = None
    not_before: float = 0.0
    step: int = 0
    total_steps: int = 0
    error: JobError | None = None
    outputs: tuple[JobOutput, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    idempotency_key: str | None = None
    fingerprint: str = ""
    webhook_url: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing changes anymore, but that it expires."""
        return self.state in ENDED


@dataclass(frozen=True)
class JobEvent:
    """A job changed its state, or its attempt.

    Attributes:
        number: 1 for the submission.
        at: seconds since the epoch.
        state: since then.
        attempt: the one that ran, or runs.
        reason: why; empty if the state says it.
    """

    number: int
    at: float
    state: State
    attempt: int
    reason: str


@dataclass(frozen=True)
class Page:
    """Some jobs of a list.

    Attributes:
        jobs: in the order that was asked for.
        has_more: whether others follow; they come after the id of the last one.
    """

    jobs: tuple[Job, ...]
    has_more: bool


@dataclass(frozen=True)
class Counts:
    """The jobs of one model that have not ended.

    Attributes:
        queued: how many wait.
        running: how many have a lease.
        queued_work: sum of the work of those that wait.
    """

    queued: int = 0
    running: int = 0
    queued_work: int = 0


@dataclass(frozen=True)
class Queued:
    """What one gateway tells of the jobs of one model that wait: its share of them.

    Attributes:
        jobs: how many.
        seconds: what they will take on one gang; 0: nobody knows.
    """

    jobs: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Delivery:
    """A call that tells of the end of a job.

    Attributes:
        id: of the message; the same in each attempt.
        job_id: of the job.
        url: what is called.
        body: what is sent; the same in each attempt.
        attempt: how often it was tried, this time included.
    """

    id: str
    job_id: str
    url: str
    body: str
    attempt: int
