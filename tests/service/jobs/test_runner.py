"""What a gateway does with jobs: it runs them, extends their leases, and lets go of what is not its own anymore."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from service.api.backend import Report, Restarted, Waiting
from service.jobs import runner as module
from service.jobs.backlog import JobBacklog
from service.jobs.lost_runners import LostRunners
from service.jobs.records import Job
from service.jobs.requests import new_job, request_of
from service.jobs.runner import Runner
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.state.model_states import ModelState
from service.state.outputs import OutputStore
from sp_core.degrees import ParallelDegrees
from workers.errors import GangLost, JobsUnavailable, ModelNotFound, ModelUnavailable, QueueFull, RequestFailed
from workers.messages import GenerationRequest, GenerationResult, StepEvent

REQUEST = GenerationRequest(
    "a", "film", "a cup", 64, 64, 4, seed=7, num_frames=5, output_format="mp4", loras=(("i", 0.5),)
)
RESULT = GenerationResult((b"film",), (7,), ParallelDegrees(), 0.1, (0.1,) * 4, 0.1, ("cut",))

Script = Callable[[GenerationRequest], AsyncGenerator[Report]]


class World:
    """A store in a file, a folder of outputs, and a runner whose model does what a test says."""

    def __init__(self, folder: Path, script: Script) -> None:
        self.jobs, self.outputs = Jobs(), OutputStore()
        self.jobs.follow(str(folder / "jobs"), None, 1000.0)
        self.outputs.follow(str(folder / "outputs"), 1000.0)
        self.asked: list[tuple[str, GenerationRequest]] = []
        self.script = script
        self.room = {"film": 1}
        self.models = {"film"}
        self.gone: set[str] = set()
        self.backlog = JobBacklog(dict)
        self.runner = self.another("gateway-1")

    def another(self, name: str) -> Runner:
        """One of another gateway."""
        known = (lambda: self.room), (lambda: self.models)
        lost = LostRunners(name, lambda runner: runner not in self.gone)
        return Runner(self.jobs, self.outputs, name, self._generate, *known, self.backlog, lost)

    async def submit(self, request: GenerationRequest = REQUEST, owner: str = "ann", **given: Any) -> Job:
        job, _ = await self.jobs.ask(JobStore.submit, new_job(request, owner, **given))
        self.runner.wake()
        return job

    async def until(self, job: Job, condition: Callable[[Job], bool]) -> Job:
        async with asyncio.timeout(30):
            while not condition(found := await self.jobs.ask(JobStore.get, job.id, None)):
                await asyncio.sleep(0.01)
        return found

    async def ended(self, job: Job) -> Job:
        return await self.until(job, lambda found: found.ended)

    async def _generate(self, owner: str, request: GenerationRequest) -> AsyncGenerator[Report]:
        self.asked.append((owner, request))
        async with contextlib.aclosing(self.script(request)) as reports:
            async for report in reports:
                yield report


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RENEW_S", "AGAIN_S", "AWAY_S"):
        monkeypatch.setattr(module, name, 0.0)


def live(folder: Path, script: Script, story: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(story(World(folder, script)), 60)

    asyncio.run(run())


async def draws(request: GenerationRequest) -> AsyncGenerator[Report]:
    for step in range(1, 5):
        yield StepEvent(step, 4, 0.1)
    yield RESULT


def test_a_job_is_drawn_and_its_output_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        job = await world.submit()
        done = await world.ended(job)
        assert (done.state, done.attempt, done.runner, done.warnings) == ("succeeded", 1, "gateway-1", ("cut",))
        assert (done.step, done.total_steps, done.metrics["layout"]) == (4, 4, "1 rank")
        (output,) = done.outputs
        assert (output.size, output.seed, output.kind) == (4, 7, "mp4")
        assert world.outputs.file(output.name).read_bytes() == b"film"
        ((owner, request),) = world.asked
        assert owner == "ann"
        assert request.report_steps
        assert (request.seed, request.loras, request.num_frames) == (7, (("i", 0.5),), 5)

    live(tmp_path, draws, story)


def test_a_request_of_another_version_can_be_read() -> None:
    job = Job(
        "job_1", "video", "film", "", {**new_job(REQUEST, "").request, "of_tomorrow": 1}, 1, "standard", "queued", 0.0
    )
    kept = {name: getattr(REQUEST, name) for name in ("prompt", "loras", "seeds", "output_format", "guidance_scale")}
    found = request_of(job)
    assert {name: getattr(found, name) for name in kept} == kept


def test_one_after_the_other_while_there_is_room_for_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        jobs = [await world.submit() for _ in range(3)]
        assert [(await world.ended(job)).state for job in jobs] == ["succeeded"] * 3
        assert most == 1

    most = running = 0

    async def counted(request: GenerationRequest) -> AsyncGenerator[Report]:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        yield RESULT

    live(tmp_path, counted, story)


@pytest.mark.parametrize("forget", [JobStore.cancel, JobStore.delete])
def test_a_job_that_is_cancelled_anywhere_stops_at_the_next_report(tmp_path: Path, forget: Any) -> None:
    stopped = asyncio.Event()

    async def endless(request: GenerationRequest) -> AsyncGenerator[Report]:
        try:
            while True:
                yield Waiting(ModelState("running"))
                await asyncio.sleep(0.01)
        finally:
            stopped.set()

    async def story(world: World) -> None:
        job = await world.submit()
        await world.until(job, lambda found: found.state == "running")
        await world.jobs.ask(forget, job.id, "ann")
        await asyncio.wait_for(stopped.wait(), 10)

    live(tmp_path, endless, story)


def test_a_gateway_that_stops_gives_its_jobs_back_and_takes_no_more(tmp_path: Path) -> None:
    begun = 0

    async def endless(request: GenerationRequest) -> AsyncGenerator[Report]:
        nonlocal begun
        begun += 1
        while True:
            yield StepEvent(1, 4, 0.1)
            await asyncio.sleep(0.01)

    async def story(world: World) -> None:
        world.room = {"film": 2}
        jobs = [await world.submit() for _ in range(2)]
        for job in jobs:
            await world.until(job, lambda found: found.step == 1)
        await world.runner.stop()
        back = [await world.jobs.ask(JobStore.get, job.id, None) for job in jobs]
        assert [(job.state, job.attempt, job.step, job.lease_until) for job in back] == [("queued", 0, 0, None)] * 2
        events = await world.jobs.ask(JobStore.events, jobs[0].id)
        assert events[-1].reason == "its gateway stops"
        late = await world.submit()  # which wakes the runner
        await asyncio.sleep(0.2)
        assert (await world.jobs.ask(JobStore.get, late.id, None)).state == "queued"
        assert begun == 2
        world.script = draws
        world.another("gateway-2").wake()
        done = [await world.ended(job) for job in (*jobs, late)]
        assert [(job.state, job.attempt, job.runner) for job in done] == [("succeeded", 1, "gateway-2")] * 3

    live(tmp_path, endless, story)


def test_a_result_that_comes_after_the_lease_was_lost_is_removed(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        async def cancelled_meanwhile(request: GenerationRequest) -> AsyncGenerator[Report]:
            await world.jobs.ask(JobStore.cancel, job.id, "ann")
            yield RESULT

        world.script = cancelled_meanwhile
        job = await world.submit()
        assert (await world.ended(job)).state == "cancelled"
        while world.runner._running:
            await asyncio.sleep(0.01)
        assert list((tmp_path / "outputs").glob("*.mp4")) == []

    live(tmp_path, draws, story)


def failing(*errors: Exception) -> Script:
    left = list(errors)

    async def script(request: GenerationRequest) -> AsyncGenerator[Report]:
        if left:
            raise left.pop(0)
        yield RESULT

    return script


@pytest.mark.parametrize(
    ("errors", "state", "code", "attempts"),
    [
        ([QueueFull("full")] * 5, "succeeded", None, 1),
        ([ModelNotFound("removed")] * 5, "succeeded", None, 1),
        ([ModelUnavailable("asleep")] * 2, "succeeded", None, 3),
        ([ModelUnavailable("asleep")] * 3, "failed", "model_unavailable", 3),
        ([RequestFailed("rank 1: MemoryError")], "failed", "generation_failed", 1),
        ([GangLost("twice")], "failed", "request_quarantined", 1),
        ([ZeroDivisionError("secret detail")], "failed", "internal_error", 1),
    ],
)
def test_an_error_decides_what_becomes_of_the_job(
    tmp_path: Path, errors: list[Exception], state: str, code: str | None, attempts: int
) -> None:
    async def story(world: World) -> None:
        done = await world.ended(await world.submit())
        assert (done.state, done.error and done.error.code, done.attempt) == (state, code, attempts)
        assert "secret" not in str(done.error)

    live(tmp_path, failing(*errors), story)


def test_lost_gangs_are_counted_if_they_had_begun(tmp_path: Path) -> None:
    async def unlucky(request: GenerationRequest) -> AsyncGenerator[Report]:
        yield Restarted(2, "moved", begun=False)
        yield Restarted(3, "rank 0 died", begun=True)
        yield RESULT

    async def story(world: World) -> None:
        done = await world.ended(await world.submit())
        assert (done.state, done.gang_losses) == ("succeeded", 1)

        async def poisoned(request: GenerationRequest) -> AsyncGenerator[Report]:
            for attempt in (2, 3, 4):
                yield Restarted(attempt, "rank 0 died", begun=True)
            yield RESULT

        world.script = poisoned
        lost = await world.ended(await world.submit())
        assert (lost.state, lost.gang_losses, lost.error and lost.error.code) == ("failed", 2, "request_quarantined")

    live(tmp_path, unlucky, story)


def test_what_is_drawn_while_the_store_is_away_is_published_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = True
    ask = Jobs.ask

    async def sometimes(jobs: Jobs, call: Any, *args: Any, **kwargs: Any) -> Any:
        if away and call in (JobStore.renew, JobStore.publish):
            refused.append(call)
            if call is JobStore.publish:
                seen.set()
            raise JobsUnavailable("away")
        return await ask(jobs, call, *args, **kwargs)

    refused: list[Any] = []
    seen = asyncio.Event()
    monkeypatch.setattr(Jobs, "ask", sometimes)

    async def story(world: World) -> None:
        nonlocal away
        job = await world.submit()
        await asyncio.wait_for(seen.wait(), 10)
        assert JobStore.renew in refused
        away = False
        assert (await world.ended(job)).state == "succeeded"
        assert len(world.asked) == 1

    live(tmp_path, draws, story)


def test_outputs_that_cannot_be_written_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(outputs: OutputStore, content: bytes, kind: str) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OutputStore, "keep", full)

    async def story(world: World) -> None:
        done = await world.ended(await world.submit())
        assert (done.state, done.attempt) == ("failed", 3)
        assert done.error is not None
        assert "No space left on device" in done.error.message

    live(tmp_path, draws, story)


def test_the_jobs_of_a_gateway_that_is_gone_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)

    async def story(world: World) -> None:
        other = Jobs()
        other.follow(str(tmp_path / "jobs"), None, 1000.0)
        await world.jobs.ask(JobStore.counts)
        assert world.jobs._own is not None
        world.jobs._own._database._patience_s = 0.0
        job, _ = await other.ask(JobStore.submit, new_job(REQUEST, "ann"))
        (taken,) = await other.ask(JobStore.claim, {"film": 1}, "gateway-0", 0.1)
        world.runner.wake()
        done = await world.ended(job)
        assert (done.state, done.attempt, done.runner) == ("succeeded", 2, "gateway-1")
        assert world.asked[0][1].seed == request_of(taken).seed

    live(tmp_path, draws, story)


class Cut:
    """The store as a gateway reaches it whose connection can be cut."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.cut, self.refused = jobs, False, list[Any]()

    async def in_use(self) -> bool:
        return await self.jobs.in_use()

    async def ask(self, call: Any, *args: Any) -> Any:
        if self.cut:
            self.refused.append(call)
            raise JobsUnavailable("cut off")
        return await self.jobs.ask(call, *args)


@pytest.mark.parametrize("first", ["before the other", "after the other"])
def test_who_is_cut_off_from_the_store_past_its_lease_adds_no_second_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)
    monkeypatch.setattr(module, "LEASE_S", 0.3)
    begun, go = [asyncio.Event(), asyncio.Event()], [asyncio.Event(), asyncio.Event()]

    async def story(world: World) -> None:
        async def attempts(request: GenerationRequest) -> AsyncGenerator[Report]:
            number = len(world.asked) - 1
            begun[number].set()
            await go[number].wait()
            yield StepEvent(1, 4, 0.1)
            yield dataclasses.replace(RESULT, outputs=(b"%d" % number,))

        async def published() -> None:  # or nobody's anymore
            while JobStore.publish not in link.refused:
                await asyncio.sleep(0.01)
            assert len(list((tmp_path / "outputs").glob("*.mp4"))) == 1 + (first == "after the other")
            link.cut = False
            while world.runner._running:
                await asyncio.sleep(0.01)

        link, world.script = Cut(world.jobs), attempts
        gateway: Any = world.runner
        gateway._jobs = link
        job = await world.submit()
        await asyncio.wait_for(begun[0].wait(), 10)
        assert world.jobs._own is not None
        world.jobs._own._database._patience_s = 0.0  # the store has just been opened
        link.cut = True
        monkeypatch.setattr(module, "LEASE_S", 60.0)
        other = world.another("gateway-2")
        while not begun[1].is_set():
            await other._claim()
            await asyncio.sleep(0.02)
        if first == "before the other":
            go[0].set()
            await published()
            held = await world.jobs.ask(JobStore.get, job.id, None)
            assert (held.state, held.runner, held.attempt) == ("running", "gateway-2", 2)
        go[1].set()
        await world.ended(job)
        if first == "after the other":
            go[0].set()
            await published()
        done = await world.jobs.ask(JobStore.get, job.id, None)
        assert (done.state, done.runner, done.attempt) == ("succeeded", "gateway-2", 2)
        (output,), (file,) = done.outputs, (tmp_path / "outputs").glob("*.mp4")
        assert (file.name, file.read_bytes()) == (output.name, b"1")
        told = [event.state for event in await world.jobs.ask(JobStore.events, job.id)]
        assert told == ["queued", "running", "queued", "running", "succeeded"]

    live(tmp_path, draws, story)


def test_jobs_of_a_model_that_is_gone_wait_for_it_and_then_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)
    monkeypatch.setattr(module, "UNSERVED_S", 0.4)

    async def story(world: World) -> None:
        world.models, world.room = set(), {}
        mistaken = await world.submit()
        async with asyncio.timeout(20):
            while not world.runner._unserved:
                await asyncio.sleep(0.01)
        world.models, world.room = {"film"}, {"film": 1}  # the operator has put it right
        world.runner.wake()
        assert (await world.ended(mistaken)).state == "succeeded"
        world.models, world.room = set(), {}
        started = (await world.ended(mistaken)).started_at or 0.0
        gone = await world.submit()
        async with asyncio.timeout(30):
            while not (done := await world.jobs.ask(JobStore.get, gone.id, None)).ended:
                world.runner.wake()
                await asyncio.sleep(0.05)
        assert (done.state, done.error and done.error.code) == ("failed", "model_not_found")
        assert (done.ended_at or 0.0) - max(done.created_at, started) >= 0.4
        assert done.error is not None
        assert "no model 'film' anymore" in done.error.message

    live(tmp_path, draws, story)


def test_what_is_claimed_is_not_told_as_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, int]] = []

    async def tell(backlog: JobBacklog, counts: Any) -> None:
        if "film" in counts:
            told.append((counts["film"].queued, counts["film"].running, counts["film"].queued_work))

    monkeypatch.setattr(JobBacklog, "tell", tell)
    release = asyncio.Event()

    async def waits(request: GenerationRequest) -> AsyncGenerator[Report]:
        await release.wait()
        yield RESULT

    async def story(world: World) -> None:
        for _ in range(3):
            await world.jobs.ask(JobStore.submit, new_job(REQUEST, "ann"))
        world.runner.wake()
        async with asyncio.timeout(20):
            while not told:
                await asyncio.sleep(0.01)
        assert told[0] == (2, 1, 2 * REQUEST.work)  # the third has been claimed in the same look
        release.set()

    live(tmp_path, waits, story)


def test_the_jobs_of_a_gateway_that_is_gone_are_begun_anew_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)

    async def hangs(request: GenerationRequest) -> AsyncGenerator[Report]:
        yield StepEvent(1, 4, 0.1)
        await asyncio.Event().wait()

    async def story(world: World) -> None:
        job = await world.submit()
        await world.until(job, lambda found: found.step == 1)
        assert world.jobs._own is not None
        world.jobs._own._database._patience_s = 0.0  # the store has just been opened
        world.script, other = draws, world.another("gateway-2")
        for _ in range(3):
            await other._claim()
        assert (await world.jobs.ask(JobStore.get, job.id, None)).runner == "gateway-1"  # it lives
        world.gone.add("gateway-1")
        await other._claim()
        done = await world.ended(job)
        assert (done.state, done.runner, done.attempt) == ("succeeded", "gateway-2", 2)

    live(tmp_path, hangs, story)


def test_who_is_gone() -> None:
    """A runner of another cluster was never seen here, alive or not."""
    alive = {"a", "b"}

    async def story() -> None:
        lost = LostRunners("own", lambda runner: runner in alive)
        runners = ["own", "", "a", "b", "elsewhere", "a"]
        assert await lost.among(runners) == []
        alive.remove("a")
        assert await lost.among(runners) == ["a"]
        assert await lost.among(runners) == []  # its leases have ended
        assert await lost.among(["b"]) == []

    asyncio.run(story())


def test_a_look_that_takes_long_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.lost_runners.LOOK_S", 0.01)
    answers, alive, looks = threading.Event(), {"a"}, []

    def lives(runner: str) -> bool:
        looks.append(runner)
        answers.wait()
        return runner in alive

    async def story() -> None:
        lost = LostRunners("own", lives)
        for _ in range(3):
            assert await lost.among(["a"]) == []
        assert looks == ["a"]  # one look, however often somebody asks
        answers.set()
        while "a" not in lost._seen:
            await lost.among(["a"])
        alive.clear()
        found: list[str] = []
        while not found:
            found = await lost.among(["a"])
        assert found == ["a"]

    asyncio.run(story())
