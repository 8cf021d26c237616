"""The operations on jobs, for REST and gRPC: submit, find, list, cancel, delete, fetch, watch.

Every gateway knows every job. A caller sees its own jobs; with the scope `admin`, or if no key is needed, all jobs.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from service.api.backend import Backend
from service.api.observed import callers_trace, key_name
from service.api.once import check_key
from service.api.responses import eta_seconds
from service.api.shares import Places
from service.jobs import inputs
from service.jobs.records import ID, Job, JobOutput, KeyReused, Kind, NewJob, Page, Priority, State
from service.jobs.requests import new_job
from service.jobs.store import JobStore
from service.state.quarantine import fingerprint
from service.state.stored import Stored
from workers.errors import (
    DeadlineExceeded,
    IdempotencyKeyReused,
    InvalidParameter,
    JobNotFound,
    JobNotReady,
    OutputNotFound,
    OutputsUnavailable,
)
from workers.messages import GenerationRequest

logger = logging.getLogger("ray.serve")

LOOK_S = 0.5
"""Seconds between two looks at a watched job. Runners report its progress about as often."""

PATIENCE_S = 5.0
"""Seconds between two signs of life to a watcher of a job that does not change."""

LONGEST_S = 3600.0
"""The most seconds of one watch: a client that has forgotten its call looks like one that waits."""

MOST_WATCHERS, MOST_OF_ONE = 100, 25
"""The most watches of one gateway, each of which asks the store twice a second: of all callers, and of one key."""

_watchers = Places()


@dataclass(frozen=True)
class Seen:
    """A job, as it was found.

    Attributes:
        job: its record.
        position: 1 for the next of its model's jobs; 0: it does not wait.
        eta_s: estimated seconds until it has ended; None: not known, or it has ended.
    """

    job: Job
    position: int = 0
    eta_s: float | None = None


class _AcceptedMeanwhile(Exception):
    """Another call with the same idempotency key was faster."""


async def submit(
    backend: Backend,
    request: GenerationRequest,
    priority: Priority,
    deadline_s: float | None,
    key: str | None,
    remixed_from: str | None = None,
    webhook_url: str | None = None,
) -> tuple[Job, bool]:
    """Accept a job. It is on disk when this returns.

    Args:
        backend: the backend of the gateway.
        request: what to make.
        priority: see `service.jobs.records`.
        deadline_s: seconds from now; None: no deadline.
        key: the idempotency key; None: there is none.
        remixed_from: the id of the job that it varies; None: it varies none.
        webhook_url: the URL to call when it has ended; None: none.

    Returns:
        The job, and whether it is new; if not, the same key was used before.

    Raises:
        InvalidParameter: the URL may not be called.
        IdempotencyKeyReused: the key came with another request, or another URL.
        DeadlineExceeded: it would end too late, and is new.
        OutputsFull, OutputsUnavailable: its outputs could not be kept, or its pictures.
        Exception: what `Backend.charge` raises.
    """
    if key is not None:
        check_key(key)
    if webhook_url is not None:
        backend.webhooks.check(webhook_url)
    known_as = _known_as(backend.caller(), request, webhook_url)
    request = replace(request, traceparent=callers_trace())
    new = new_job(request, backend.caller(), priority, deadline_s, key, known_as, remixed_from, webhook_url)
    late: DeadlineExceeded | None = None
    try:
        await backend.check_job(request, priority, deadline_s)
    except DeadlineExceeded as error:
        late = error
    try:
        # What was accepted stays so: it is not charged again, nor refused for what is full or late by now.
        if key is not None and (known := await backend.jobs.ask(JobStore.known, new)) is not None:
            backend.runner.wake()
            return known, False
        if late is not None:
            raise late
        job, fresh = await _accept(backend, request, new)
    except KeyReused as error:
        raise IdempotencyKeyReused(str(error)) from None
    backend.runner.wake()
    return job, fresh


async def _accept(backend: Backend, request: GenerationRequest, new: NewJob) -> tuple[Job, bool]:
    """Keep a job and what it begins with, for its charge; or find the one that a call with its key has made meanwhile.

    Raises:
        KeyReused: that one is of another request.
        Exception: see `submit`.
    """
    left: asyncio.CancelledError | None = None
    try:
        with backend.charge(request):
            await asyncio.to_thread(backend.outputs.prepare)
            new = await inputs.keep(backend.jobs, backend.outputs, new, request.inputs)
            submitting = asyncio.ensure_future(backend.jobs.ask(JobStore.submit, new))
            try:
                await asyncio.shield(submitting)
            except asyncio.CancelledError as error:  # the job is accepted all the same, and then it is paid for
                left = error
            job, fresh = await submitting
            if not fresh:
                raise _AcceptedMeanwhile  # so the charge is given back
    except (KeyReused, _AcceptedMeanwhile) as error:  # a store that does not answer leaves inputs, which are swept
        await asyncio.to_thread(inputs.discard, backend.outputs, new.request)
        if isinstance(error, KeyReused):
            raise
    if left is not None:
        raise left
    return job, fresh


async def find(backend: Backend, job_id: str, kind: Kind | None = None) -> Seen:
    """A job of the caller.

    Args:
        backend: of the gateway.
        job_id: of the job.
        kind: what it must make; None: anything.

    Raises:
        JobNotFound: the caller has none of this id and kind.
    """
    if not ID.fullmatch(job_id):  # databases do not take every text
        raise JobNotFound(f"{job_id[:60]!r} is no {kind or 'job'}")
    job, position = await backend.jobs.ask(JobStore.look, job_id, backend.sees())
    if kind not in (None, job.kind):
        raise JobNotFound(f"{job_id!r} is no {kind}")
    return Seen(job, position, eta_seconds(backend.states().get(job.model), position) if position else None)


async def page(
    backend: Backend,
    kind: Kind | None,
    state: State | None,
    after: str | None,
    limit: int,
    ascending: bool = False,
    name: str = "after",
) -> Page:
    """Some of the caller's jobs, the newest first; see `JobStore.page`.

    Args:
        name: of the parameter that `after` comes from.

    Raises:
        InvalidParameter: `after` is no id of a job.
    """
    if after is not None and not ID.fullmatch(after):
        raise InvalidParameter(name, f"{name} must be the id of a job, got {after[:60]!r}")
    return await backend.jobs.ask(
        JobStore.page, backend.sees(), kind=kind, state=state, after=after, limit=limit, ascending=ascending
    )


async def cancel(backend: Backend, job_id: str, kind: Kind | None = None) -> Job:
    """End a job at its next step. One that has ended stays as it is.

    Raises:
        JobNotFound: as `find`.
    """
    await find(backend, job_id, kind)
    job = await backend.jobs.ask(JobStore.cancel, job_id, backend.sees())
    backend.runner.drop(job_id)
    return job


async def delete(backend: Backend, job_id: str, kind: Kind | None = None) -> None:
    """Forget a job and its files, and stop it if it runs.

    Raises:
        JobNotFound: as `find`.
    """
    job = (await find(backend, job_id, kind)).job
    with contextlib.suppress(JobNotFound):  # it was just there: the store has been asked again after a lost answer
        job = await backend.jobs.ask(JobStore.delete, job_id, backend.sees())
    backend.runner.drop(job_id)
    await asyncio.to_thread(inputs.discard, backend.outputs, job.request)
    for output in job.outputs:
        try:
            await asyncio.to_thread(backend.outputs.discard, output.name)
        except OutputsUnavailable as error:  # the job is forgotten already; its file expires
            logger.warning("an output of job %s, which was deleted, cannot be removed: %s", job_id, error)


async def file_of(
    backend: Backend, job_id: str, index: int = 0, kind: Kind | None = None
) -> tuple[Job, JobOutput, Stored]:
    """One finished file of a job.

    Raises:
        JobNotFound: as `find`.
        JobNotReady: it has not succeeded.
        OutputNotFound: it has fewer files, or they are not kept here, or not anymore.
    """
    job = (await find(backend, job_id, kind)).job
    if job.state != "succeeded":
        said = f"it is {job.state}" if not job.ended else f"there will be none: {job.error and job.error.message}"
        raise JobNotReady(f"{job_id!r} has no content; {said}")
    if not 0 <= index < len(job.outputs):
        raise OutputNotFound(f"{job_id!r} has {len(job.outputs)} files, the first is number 0; there is no {index}")
    output = job.outputs[index]
    return job, output, await asyncio.to_thread(backend.outputs.file, output.name)


async def watch(backend: Backend, job_id: str, kind: Kind | None = None) -> AsyncGenerator[Seen | None]:
    """Yield a job now and at each change, until it has ended; None if nothing has changed for a while.

    It ends early when the gateway drains, or after `LONGEST_S`. The watcher then asks again, and may reach another
    gateway.

    Raises:
        JobNotFound: as `find`; later, it was deleted.
        QueueFull: too many watch jobs here, or too many of this caller.
        JobsUnavailable: the store is away; the job goes on.
    """
    what = "watch jobs in this gateway; close some, or ask how the job is doing"
    with _watchers.taken(key_name.get(), MOST_WATCHERS, MOST_OF_ONE, what):
        pace, told, told_at, until = Pace(), None, time.monotonic(), time.monotonic() + LONGEST_S
        while time.monotonic() < until:
            drains = backend.draining  # before the look, so that the last one told is that of a gateway that drains
            seen = pace.judge(await find(backend, job_id, kind))
            now = time.monotonic()
            if told is None or _shown(seen) != _shown(told):
                told, told_at = seen, now
                yield seen
            elif now - told_at >= PATIENCE_S:
                told_at = now
                yield None
            if seen.job.ended or drains:
                return
            await asyncio.sleep(LOOK_S)


def _known_as(caller: str, request: GenerationRequest, webhook_url: str | None) -> str:
    """The fingerprint of a job for its key. It contains the webhook URL, since of two URLs one would never be called.

    Without a URL the fingerprint is the same as in versions without webhooks.
    """
    known_as = fingerprint(caller, request)
    return known_as if webhook_url is None else hashlib.sha256(f"{known_as}\n{webhook_url}".encode()).hexdigest()


class Pace:
    """The pace of a job's steps, as seen by one watch."""

    def __init__(self) -> None:
        self._first: tuple[int, int, float] | None = None  # fence, step, when: the first look at this attempt's steps

    def judge(self, seen: Seen) -> Seen:
        """The same job; if it runs, with an estimate from its remaining steps."""
        job, now = seen.job, time.monotonic()
        if job.state != "running" or not job.step:
            self._first = None
            return seen
        if self._first is None or self._first[0] != job.fence or self._first[1] > job.step:
            self._first = (job.fence, job.step, now)
        _, step, since = self._first
        if job.step == step:
            return seen
        left = job.total_steps - job.step
        return Seen(job, seen.position, round(left * (now - since) / (job.step - step), 1))


def _shown(seen: Seen) -> tuple[object, ...]:
    """The parts of a job whose changes a watch reports."""
    job = seen.job
    return job.state, job.attempt, job.gang_losses, job.step, job.total_steps, seen.position
