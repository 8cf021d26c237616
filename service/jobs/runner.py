"""Runs jobs in a gateway: claims what a model has room for, runs it as any other request, and publishes its outputs.

The gateway's own `generate` does the work, so a job waits its turn among all requests of its owner. Each report extends
the lease. A job that was cancelled, deleted or given to another attempt is stopped at the next report; what has no
result is queued again by whoever looks at the store next. Started by `service.gateway`.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ray.exceptions import RayError

from deploy.model_spec import ModelSpec
from service.api.backend import Report, Restarted
from service.api.errors import find_status
from service.jobs import inputs
from service.jobs.backlog import JobBacklog
from service.jobs.lost_runners import LostRunners
from service.jobs.observed import ObservedJobs
from service.jobs.patience import Patience
from service.jobs.records import QUARANTINED, Counts, Job, JobError, LeaseLost
from service.jobs.results import AWAY_S, NOT_NOW, NotWritten, Results, in_time
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.jobs.unserved import Unserved
from service.state.outputs import OutputStore
from workers.errors import (
    GangLost,
    InvalidParameter,
    JobsUnavailable,
    ModelNotFound,
    ModelUnavailable,
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

BEAT_S = 5.0
"""Between two extensions of a lease while files are read or written, of which nobody reports."""

PERIOD_S = 1.0
"""Between two looks for jobs that other gateways have taken in."""

SWEEP_S = 5.0
"""Between two looks for jobs whose runner is silent or gone."""

INPUTS_S = 60.0
"""Between two looks for files that no job begins with anymore."""

AGAIN_S = 5.0
"""A job that could not be begun, or whose model cannot be started, is not tried again earlier."""

NOT_BEGUN = (QueueFull, RateLimited, ShuttingDown, ModelNotFound)
"""Of no account for a job: it waits longer; for a model that was removed see `service.jobs.unserved`."""


class NotNow(Exception):
    """What a job begins with cannot be read now, or there is no room for what it makes."""


Result = TypeVar("Result")
Generate = Callable[[str, GenerationRequest], AsyncGenerator[Report]]


class Runner:
    """The jobs that one gateway runs.

    Args:
        jobs: the store.
        outputs: where finished files go.
        name: of this gateway, for the record.
        generate: runs a request of an owner.
        room: by model, how many jobs may run in the whole deployment now, which is that of one cluster.
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
        models: Callable[[], Mapping[str, ModelSpec]],
        backlog: JobBacklog,
        lost: LostRunners,
    ) -> None:
        self._jobs, self._outputs, self._name = jobs, outputs, name
        self._generate, self._room, self._backlog = generate, room, backlog
        self._lost = lost
        self._unserved = Unserved(jobs, models)
        self._patience = Patience()
        self._running: dict[str, tuple[Job, asyncio.Task[None]]] = {}
        self._results = Results(jobs, outputs)
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
        """A job was cancelled or deleted here, or is begun anew: stop it at once, if it runs here.

        One whose result is being told hears from the store whether it came too late.
        """
        if job_id in self._running:
            job, task = self._running[job_id]
            if not self._results.tells(job):
                task.cancel()

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
            await self._jobs.ask(JobStore.disown, self._name, tuple(self._running))
            await self._jobs.ask(JobStore.sweep)
            self._sweep_inputs()
        counts = await self._jobs.ask(JobStore.counts)
        if sweeps:
            counts = await self._unserved.settle(counts)
            self._observed.tell_ended(await self._jobs.ask(JobStore.ended), self._room())
            self._observed.tell_disk(await self._jobs.ask(JobStore.disk))
        self._observed.tell(counts, self._room())
        waiting = {model: most for model, most in self._room().items() if model in counts and counts[model].queued}
        others = self._lost.strangers  # who are counted, too
        room = {model: most for model, most in waiting.items() if others or most > counts[model].running}
        claimed = await self._jobs.ask(JobStore.claim, room, self._name, LEASE_S, others) if room else []
        for job in claimed:
            self.drop(job.id)  # an attempt that has lost its lease, and has not heard of it
            self._running[job.id] = job, asyncio.get_running_loop().create_task(self._run(job))
        await self._backlog.tell(_without(counts, claimed))

    def _sweep_inputs(self) -> None:
        """Beside the other work, for a bucket may be slow."""
        idle = self._sweeping is None or self._sweeping.done()
        if idle and time.monotonic() - self._inputs_at >= INPUTS_S:
            self._inputs_at = time.monotonic()
            self._sweeping = asyncio.get_running_loop().create_task(inputs.sweep(self._jobs, self._outputs))

    async def _run(self, job: Job) -> None:
        """One attempt, and what becomes of the job if it fails."""
        next_at_once = True
        try:
            await self._attempt(job)
        except LeaseLost:
            logger.info("job %s is not run here anymore", job.id)
        except (*NOT_BEGUN, NotNow) as error:
            next_at_once = False  # it would most likely fare the same, and so on through the whole queue
            await self._tell(job, JobStore.give_back, str(error), AGAIN_S)
        except ModelUnavailable as error:
            next_at_once = False
            if self._patience.waits_on(job):
                await self._tell(job, JobStore.give_back, str(error), AGAIN_S)
            else:
                await self._tell(job, JobStore.fail, _told(error))
        except NotWritten as error:
            await self._tell(job, JobStore.try_again, _told(error), AGAIN_S)
        except RayError as error:  # what it needs of the cluster may be there again by then
            logger.exception("job %s is tried again", job.id)
            await self._tell(job, JobStore.try_again, _told(error), AGAIN_S)
        except Exception as error:
            if not isinstance(error, SprayError):
                logger.exception("job %s failed", job.id)
            await self._tell(job, JobStore.fail, _told(error))
        finally:
            if job.id in self._running and self._running[job.id][0] is job:  # else the next attempt has begun
                del self._running[job.id]
            if next_at_once:
                self.wake()

    async def _tell(self, job: Job, call: Callable[..., Job], *args: object) -> None:
        """Say how an attempt ended. If the store is away, the lease says it."""
        with contextlib.suppress(LeaseLost, JobsUnavailable):
            await self._jobs.ask(call, job.id, job.fence, *args)

    async def _attempt(self, job: Job) -> None:
        request = await self._holding(job, self._request(job))
        renewed_at, losses, step = time.monotonic(), job.gang_losses, StepEvent(0, 0, 0.0)
        async with contextlib.aclosing(self._generate(job.owner, request)) as reports:
            async for report in reports:
                if isinstance(report, GenerationResult):
                    holding = functools.partial(self._holding, job, steps=request.num_inference_steps)
                    await self._results.publish(job, report, holding)
                    return
                if isinstance(report, Restarted) and report.begun:
                    losses += 1
                    await self._lose_gang(job, losses, report.reason)
                if isinstance(report, StepEvent):
                    step = report
                    self._patience.begun(job)
                elif isinstance(report, Restarted):
                    step = StepEvent(0, step.total_steps, 0.0)
                if time.monotonic() - renewed_at >= RENEW_S:
                    with contextlib.suppress(JobsUnavailable):  # the work goes on, and is published later
                        await self._jobs.ask(JobStore.renew, job.id, job.fence, LEASE_S, step.step, step.total_steps)
                    renewed_at = time.monotonic()  # what was reported while it lasted is not told step by step
        raise GangLost("the ranks ended without a result")

    async def _holding(self, job: Job, work: Coroutine[Any, Any, Result], steps: int = 0) -> Result:
        """What `work` returns, which waits for a folder or bucket and not for a gang. The lease is extended meanwhile.

        Args:
            job: of this runner.
            work: ends in time by itself. It is cancelled with this call.
            steps: that are done by now.

        Raises:
            LeaseLost: the job is not this runner's anymore.
            Exception: what `work` raises.
        """
        task = asyncio.get_running_loop().create_task(work)
        try:
            while not (await asyncio.wait([task], timeout=BEAT_S))[0]:
                with contextlib.suppress(JobsUnavailable):
                    await self._jobs.ask(JobStore.renew, job.id, job.fence, LEASE_S, steps, steps)
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _request(self, job: Job) -> GenerationRequest:
        """What is to be run, once there is room for what it makes.

        Raises:
            InputNotFound: what it begins with is gone, or is another picture.
            NotNow: it cannot be run now.
        """
        deadline_at = None
        if job.deadline_at is not None and job.started_at is not None:  # by the store's clock, and just started
            deadline_at = time.time() + job.deadline_at - job.started_at
        try:
            await in_time(asyncio.to_thread(self._outputs.prepare, outputs_only=True))
            request = replace(await in_time(self._read(job)), model=job.model, deadline_at=deadline_at)
        except NOT_NOW as error:
            self._backlog.hold()
            logger.warning("job %s cannot be begun now, and is tried again: %s", job.id, error)
            raise NotNow("its files cannot be read or written now") from error
        self._backlog.release()
        return request

    async def _read(self, job: Job) -> GenerationRequest:
        while True:
            try:
                return await inputs.request_of(self._jobs, self._outputs, job)
            except JobsUnavailable:  # it has pictures, too, and just let this gateway claim the job
                await asyncio.sleep(AWAY_S)

    async def _lose_gang(self, job: Job, losses: int, reason: str) -> None:
        """Count a lost gang.

        Raises:
            LeaseLost: it was one too many, or the job is not this runner's anymore.
        """
        with contextlib.suppress(JobsUnavailable):
            if (await self._jobs.ask(JobStore.lose_gang, job.id, job.fence, losses, reason)).ended:
                raise LeaseLost(job.id)


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
