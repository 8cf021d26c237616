"""Jobs whose gateway stops, dies or is cut off: others take them over, and one result is kept."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from service.api.backend import Report
from service.jobs import runner as module
from service.jobs.requests import asked_of, new_job
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from tests.service.jobs.gateways import REQUEST, RESULT, World, draws, live
from workers.errors import JobsUnavailable
from workers.messages import GenerationRequest, StepEvent

pytestmark = pytest.mark.usefixtures("quick")


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
        assert world.asked[0][1].seed == asked_of(taken).seed

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
        gateway._jobs = gateway._results._jobs = link
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


def test_the_jobs_of_a_gateway_that_is_gone_are_begun_anew_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)
    monkeypatch.setattr(module, "PERIOD_S", 60.0)  # who is gone does not look for jobs

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


def test_clusters_that_share_a_store_run_jobs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)

    async def story(world: World) -> None:
        world.gone.add("elsewhere")  # cannot be seen from here
        first, _ = await world.jobs.ask(JobStore.submit, new_job(REQUEST, "ann"))
        await world.jobs.ask(JobStore.claim, {"film": 1}, "elsewhere", 60.0)
        assert world.room == {"film": 1}
        second = await world.submit()
        assert (await world.ended(second)).runner == "gateway-1"
        assert (await world.jobs.ask(JobStore.get, first.id, None)).runner == "elsewhere"
        assert len(world.asked) == 1

    live(tmp_path, draws, story)
