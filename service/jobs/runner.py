"""Runs jobs in a gateway: claims what a model has room for, runs it as any other request, and publishes its outputs.

The gateway's own `generate` does the work, so a job waits its turn among all requests of its owner. Each report extends
the lease. A job that was cancelled, deleted or given to another attempt is stopped at the next report; what has no
result is queued again by whoever looks at the store next. Started by `service.gateway`.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence

from service.api.backend import Report, Restarted
from service.api.errors import find_status
from service.api.responses import metrics
from service.jobs import inputs
from service.jobs.backlog import JobBacklog
from service.jobs.lost_runners import LostRunners
from service.jobs.observed import ObservedJobs
from service.jobs.records import QUARANTINED, Counts, Job, JobError, JobOutput, LeaseLost
from service.jobs.requests import asked_of
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.state.outputs import Link, OutputStore
from workers.errors import (
    GangLost,
    InvalidParameter,
    JobsUnavailable,
    ModelNotFound,
    ModelUnavailable,
    OutputsFull,
    OutputsUnavailable,
    QueueFull,
    RateLimited,
    ShuttingDown,
    SprayError,
)
from workers.messages import GenerationRequest, GenerationResult, StepEvent

logger = logging.getLogger("ray.serve")

LEASE_S = 30.0
"""A gateway that says nothing for so long has lost its jobs. The gateway's reports come every five seconds at least."""

RENEW_S = 0.5
"""At most so often: each is a write to the store's disk."""

PERIOD_S = 1.0
"""Between two looks for jobs that other gateways have taken in."""

SWEEP_S = 5.0
"""Between two looks for jobs whose runner is silent or gone."""

INPUTS_S = 60.0
"""Between two looks for files that no job begins with anymore."""

AGAIN_S = 5.0
"""A job that could not be begun, or whose model cannot be started, is not tried again earlier."""

AWAY_S = 1.0
"""Between two tries to publish while the store is away, or the outputs cannot be written."""

WRITES = 5
"""Tries to write a file, before its job is drawn again."""

NOT_NOW = (OSError, OutputsFull, OutputsUnavailable)
"""What may pass."""

UNSERVED_S = 900.0
"""How long jobs wait for a model that the deployment does not have. Not at once: an operator who has left a model out
by mistake puts it back within minutes, and wants what was accepted to be drawn then. Not for ever: whoever polls a job,
or waits for its webhook, has to hear that nobody will draw it."""

NOT_BEGUN = (QueueFull, RateLimited, ShuttingDown, ModelNotFound)
"""Of no account for a job: it waits longer; for a model that was removed see `UNSERVED_S`."""


class NotRead(Exception):
    """What a job begins with cannot be read now."""


class NotWritten(Exception):
    """The outputs of a job cannot be written."""


Generate = Callable[[str, GenerationRequest], AsyncGenerator[Report]]


class Runner:
    """The jobs that one gateway runs.

    Args:
        jobs: the store.
        outputs: where finished files go.
        name: of this gateway, for the record.
        generate: runs a request of an owner.
        room: by model, how many jobs may run in the whole deployment now.
        models: of the deployment; those that are about to start, or asleep, included.
        backlog: is told what waits after each look.
        lost: which other runners are gone.
    """

    def __init__(
        self,
        jobs: Jobs,
        outputs: OutputStore,
        name: str,
        generate: Generate,
        room: Callable[[], Mapping[str, int]],
        models: Callable[[], Collection[str]],
        backlog: JobBacklog,
        lost: LostRunners,
    ) -> None:
        self._jobs, self._outputs, self._name = jobs, outputs, name
        self._generate, self._room, self._models, self._backlog = generate, room, models, backlog
        self._lost = lost
        self._unserved: dict[str, float] = {}  # models for which jobs wait, and since when there is no such model
        self._running: dict[str, tuple[Job, asyncio.Task[None]]] = {}
        self._observed = ObservedJobs()
        self._wake = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._swept_at = 0.0
        self._inputs_at = -INPUTS_S
        self._sweeping: asyncio.Task[None] | None = None
        self._stopped = False

    def follow(self) -> None:
        """Claim jobs from now on."""
        self._following = self._following or asyncio.get_running_loop().create_task(self._follow())

    def wake(self) -> None:
        """A job was submitted here, or has ended: look at once."""
        self.follow()
        self._wake.set()

    def drop(self, job_id: str) -> None:
        """A job was cancelled or deleted here: stop it at once, if it runs here."""
        if job_id in self._running:
            self._running[job_id][1].cancel()

    async def stop(self) -> None:
        """Take no more jobs, and give back those that run here: another gateway begins them anew at once.

        Without this their leases would have to end first. The attempt does not count.
        """
        self._stopped = True
        self._wake.set()
        if self._following is not None:
            await asyncio.wait([self._following])  # it may be claiming jobs
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.gather(*(self._give_back(job, task) for job, task in list(self._running.values())))

    async def _give_back(self, job: Job, task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.wait([task])
        await self._tell(job, JobStore.give_back, "its gateway stops")

    async def _follow(self) -> None:
        while not self._stopped:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):  # `wait_for` loses a cancellation that comes as it wakes
                    await self._wake.wait()
            self._wake.clear()
            try:
                if not self._stopped and await self._jobs.in_use():
                    await self._claim()
            except JobsUnavailable:  # the log has why
                pass
            except Exception:  # whatever it is, the next jobs must run
                logger.exception("jobs cannot be claimed")

    async def _claim(self) -> None:
        sweeps = time.monotonic() - self._swept_at >= SWEEP_S
        if sweeps:
            self._swept_at = time.monotonic()
            for runner in await self._lost.among(await self._jobs.ask(JobStore.runners)):
                logger.warning("%s is gone; its jobs are begun anew", runner)
                await self._jobs.ask(JobStore.end_leases, runner)
            await self._jobs.ask(JobStore.sweep)
            self._sweep_inputs()
        counts = await self._jobs.ask(JobStore.counts)
        if sweeps:
            await self._end_unserved(counts)
            self._observed.tell_ended(await self._jobs.ask(JobStore.ended), self._room())
        self._observed.tell(counts, self._room())
        waiting = {model: most for model, most in self._room().items() if model in counts and counts[model].queued}
        room = {model: most for model, most in waiting.items() if most > counts[model].running}
        claimed = await self._jobs.ask(JobStore.claim, room, self._name, LEASE_S) if room else []
        for job in claimed:
            self._running[job.id] = job, asyncio.get_running_loop().create_task(self._run(job))
        await self._backlog.tell(_without(counts, claimed))

    def _sweep_inputs(self) -> None:
        """Beside the other work, for a bucket may be slow."""
        idle = self._sweeping is None or self._sweeping.done()
        if idle and time.monotonic() - self._inputs_at >= INPUTS_S:
            self._inputs_at = time.monotonic()
            self._sweeping = asyncio.get_running_loop().create_task(inputs.sweep(self._jobs, self._outputs))

    async def _end_unserved(self, counts: Mapping[str, Counts]) -> None:
        """End jobs of models that are gone for `UNSERVED_S`."""
        now, models = time.monotonic(), self._models()
        gone = [model for model, found in counts.items() if found.queued and model not in models]
        self._unserved = {model: self._unserved.get(model, now) for model in gone}
        for model, since in self._unserved.items():
            if now - since >= UNSERVED_S and (ended := await self._jobs.ask(JobStore.end_unserved, model, UNSERVED_S)):
                logger.warning("%d jobs have failed: the deployment has no model %r anymore", ended, model)

    async def _run(self, job: Job) -> None:
        """One attempt, and what becomes of the job if it fails."""
        try:
            await self._attempt(job)
        except LeaseLost:
            logger.info("job %s is not run here anymore", job.id)
        except (*NOT_BEGUN, NotRead) as error:
            await self._tell(job, JobStore.give_back, str(error), AGAIN_S)
        except (ModelUnavailable, NotWritten) as error:
            await self._tell(job, JobStore.try_again, _told(error), AGAIN_S)
        except Exception as error:
            if not isinstance(error, SprayError):
                logger.exception("job %s failed", job.id)
            await self._tell(job, JobStore.fail, _told(error))
        finally:
            self._running.pop(job.id, None)
            self.wake()

    async def _tell(self, job: Job, call: Callable[..., Job], *args: object) -> None:
        """Say how an attempt ended. If the store is away, the lease says it."""
        with contextlib.suppress(LeaseLost, JobsUnavailable):
            await self._jobs.ask(call, job.id, job.fence, *args)

    async def _attempt(self, job: Job) -> None:
        request = await self._request(job)
        renewed_at, losses, step = time.monotonic(), job.gang_losses, StepEvent(0, 0, 0.0)
        async with contextlib.aclosing(self._generate(job.owner, request)) as reports:
            async for report in reports:
                if isinstance(report, GenerationResult):
                    await self._publish(job, report)
                    return
                if isinstance(report, Restarted) and report.begun:
                    losses += 1
                    await self._lose_gang(job, losses, report.reason)
                if isinstance(report, StepEvent):
                    step = report
                elif isinstance(report, Restarted):
                    step = StepEvent(0, step.total_steps, 0.0)
                if time.monotonic() - renewed_at >= RENEW_S:
                    with contextlib.suppress(JobsUnavailable):  # the work goes on, and is published later
                        await self._jobs.ask(JobStore.renew, job.id, job.fence, LEASE_S, step.step, step.total_steps)
                    renewed_at = time.monotonic()  # what was reported while it lasted is not told step by step
        raise GangLost("the ranks ended without a result")

    async def _request(self, job: Job) -> GenerationRequest:
        """What is to be run.

        Raises:
            InputNotFound: what it begins with is gone, or is another picture.
            NotRead: it cannot be read now.
        """
        try:
            return await asyncio.to_thread(inputs.request_of, self._outputs, job)
        except (OSError, OutputsUnavailable) as error:
            logger.warning("what job %s begins with cannot be read, and is tried again: %s", job.id, error)
            raise NotRead("what the job begins with cannot be read now") from error

    async def _lose_gang(self, job: Job, losses: int, reason: str) -> None:
        """Count a lost gang.

        Raises:
            LeaseLost: it was one too many, or the job is not this runner's anymore.
        """
        with contextlib.suppress(JobsUnavailable):
            if (await self._jobs.ask(JobStore.lose_gang, job.id, job.fence, losses, reason)).ended:
                raise LeaseLost(job.id)

    async def _publish(self, job: Job, result: GenerationResult) -> None:
        """Write the outputs, then tell the store, however long it is away.

        Raises:
            LeaseLost: the job is not this runner's anymore. Its outputs are removed.
            NotWritten: they cannot be written.
        """
        kind = str(asked_of(job).output_format)
        made: list[JobOutput] = []
        try:
            for content, seed in zip(result.outputs, result.seeds, strict=True):
                link = await self._keep(job, content, kind)
                digest = await asyncio.to_thread(hashlib.sha256, content)
                made.append(JobOutput(link.name, kind, len(content), digest.hexdigest(), seed))
            while True:
                try:
                    said = (metrics(result), result.warnings, len(result.step_seconds))
                    await self._jobs.ask(JobStore.publish, job.id, job.fence, made, *said)
                    return
                except JobsUnavailable:
                    await asyncio.sleep(AWAY_S)
        except (LeaseLost, NotWritten):
            for output in made:
                with contextlib.suppress(*NOT_NOW):
                    await asyncio.to_thread(self._outputs.discard, output.name)
            raise

    async def _keep(self, job: Job, content: bytes, kind: str) -> Link:
        """Write a file. What was drawn is worth some patience.

        Raises:
            LeaseLost: the job is not this runner's anymore.
            NotWritten: it cannot be written.
        """
        for left in reversed(range(WRITES)):
            try:
                return await asyncio.to_thread(self._outputs.keep, content, kind)
            except NOT_NOW as error:
                said = (error.strerror if isinstance(error, OSError) else None) or str(error)
                if not left:
                    raise NotWritten(said) from error
                logger.warning("an output of job %s cannot be written, and is tried again: %s", job.id, said)
            await asyncio.sleep(AWAY_S)
            steps = asked_of(job).num_inference_steps
            with contextlib.suppress(JobsUnavailable):
                await self._jobs.ask(JobStore.renew, job.id, job.fence, LEASE_S, steps, steps)
        raise AssertionError


def _without(counts: Mapping[str, Counts], claimed: Sequence[Job]) -> dict[str, Counts]:
    """The counts as they are once these jobs do not wait anymore."""
    left = dict(counts)
    for job in claimed:
        was = left[job.model]
        left[job.model] = Counts(max(0, was.queued - 1), was.running + 1, max(0, was.queued_work - job.work))
    return left


def _told(error: Exception) -> JobError:
    """An error as the job's record has it: in the words of the API."""
    status = find_status(error)
    code = error.code if isinstance(error, InvalidParameter) else status.code
    if isinstance(error, GangLost):
        code = QUARANTINED
    message = str(error) if isinstance(error, SprayError) else "the server made a mistake; its log has the details"
    if isinstance(error, NotWritten):
        message = f"the outputs cannot be written: {error}"
    return JobError(code, message, getattr(error, "param", None))
