"""Folders and buckets that answer late or not at all: the jobs that wait for them keep their leases."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.backend import Report
from service.jobs import results, runner
from service.jobs.records import Job
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.state.outputs import OutputStore
from tests.service.jobs.gateways import RESULT, World, draws, live
from tests.service.jobs.test_inputs import EDIT
from workers.errors import JobsUnavailable, OutputsFull
from workers.messages import GenerationRequest, StepEvent

pytestmark = pytest.mark.usefixtures("quick")

LEASE_S = 0.5


class Place:
    """Calls of the place of files, which wait until a test lets them go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Say nothing."""
        self.reached.set()
        assert self.go.wait(30)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    for name, value in (("LEASE_S", LEASE_S), ("BEAT_S", 0.05), ("SWEEP_S", 0.0), ("PERIOD_S", 0.05)):
        monkeypatch.setattr(runner, name, value)
    place = Place()
    yield place
    place.go.set()


def slow(monkeypatch: pytest.MonkeyPatch, place: Place, call: str) -> None:
    """Let a call of the place wait."""
    plain = getattr(OutputStore, call)

    def waits(*args: Any) -> Any:
        place.wait()
        return plain(*args)

    monkeypatch.setattr(OutputStore, call, waits)


async def impatient(world: World) -> None:
    """Let leases count at once, though the store has just been opened."""
    await world.jobs.ask(JobStore.counts)
    assert world.jobs._own is not None
    world.jobs._own._database._patience_s = 0.0


async def reached(place: Place) -> None:
    async with asyncio.timeout(20):
        while not place.reached.is_set():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("call", ["input", "keep"])
def test_a_job_keeps_its_lease_while_files_are_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, call: str
) -> None:
    async def story(world: World) -> None:
        await impatient(world)
        job = await world.submit(EDIT)
        await reached(place)
        world.another("gateway-2").follow()
        await asyncio.sleep(4 * LEASE_S)
        place.go.set()
        done = await world.ended(job)
        assert (done.state, done.attempt, done.runner, len(world.asked)) == ("succeeded", 1, "gateway-1", 1)

    slow(monkeypatch, place, call)
    live(tmp_path, draws, story)


def test_what_is_silent_for_too_long_is_given_up_and_no_attempt_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    async def story(world: World) -> None:
        await impatient(world)
        job = await world.submit(EDIT)
        await world.until(job, lambda found: found.fence >= 5)
        monkeypatch.setattr(results, "SILENT_S", 60.0)
        place.go.set()
        done = await world.ended(job)
        assert (done.state, done.attempt) == ("succeeded", 1)

    monkeypatch.setattr(results, "SILENT_S", 0.05)
    slow(monkeypatch, place, "input")
    live(tmp_path, draws, story)


@pytest.mark.parametrize("forget", [JobStore.cancel, JobStore.delete])
@pytest.mark.parametrize("here", [True, False])
def test_a_job_that_is_cancelled_while_its_files_are_written_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, forget: Any, here: bool
) -> None:
    keep, written = OutputStore.keep, list[str]()

    def second_waits(outputs: OutputStore, *args: Any) -> Any:
        if written:
            place.wait()
            raise OSError(5, "Input/output error")
        link = keep(outputs, *args)
        written.append(link.name)
        return link

    async def story(world: World) -> None:
        job = await world.submit()
        await reached(place)
        await world.jobs.ask(forget, job.id, None)
        if here:
            world.runner.drop(job.id)
        async with asyncio.timeout(20):
            while world.runner._running:
                await asyncio.sleep(0.01)
        assert not place.go.is_set()
        assert written and not (tmp_path / "outputs" / written[0]).exists()
        place.go.set()  # else the end of the loop waits for its thread

    async def two(request: GenerationRequest) -> AsyncGenerator[Report]:
        yield _two()

    monkeypatch.setattr(OutputStore, "keep", second_waits)
    live(tmp_path, two, story)


def test_a_gang_that_reports_nothing_loses_its_lease(tmp_path: Path, place: Place) -> None:
    async def hangs(request: GenerationRequest) -> AsyncGenerator[Report]:
        yield StepEvent(1, 4, 0.1)
        await asyncio.Event().wait()

    async def story(world: World) -> None:
        await impatient(world)
        job = await world.submit()
        await world.until(job, lambda found: found.step == 1)
        world.script = draws
        done = await world.ended(job)
        assert (done.state, done.attempt) == ("succeeded", 2)

    live(tmp_path, hangs, story)


def test_an_attempt_that_has_lost_its_lease_is_stopped_and_does_not_hide_the_next(tmp_path: Path, place: Place) -> None:
    stopped, go = list[int](), asyncio.Event()

    async def story(world: World) -> None:
        async def hangs(request: GenerationRequest) -> AsyncGenerator[Report]:
            attempt = len(world.asked)
            try:
                yield StepEvent(1, 4, 0.1)
                while attempt == 2 and not go.is_set():
                    yield StepEvent(2, 4, 0.1)
                    await asyncio.sleep(0.01)
                await asyncio.Event().wait() if attempt == 1 else None
                yield RESULT
            finally:
                stopped.append(attempt)

        world.script = hangs
        await impatient(world)
        job = await world.submit()
        await world.until(job, lambda found: found.attempt == 2 and found.step == 2)
        assert stopped == [1]
        held, _ = world.runner._running[job.id]
        assert held.attempt == 2
        go.set()
        assert (await world.ended(job)).attempt == 2

    live(tmp_path, draws, story)


@pytest.mark.parametrize("first", ["publish", "cancel"])
def test_the_store_says_whether_a_job_was_cancelled_before_it_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, first: str
) -> None:
    """Both come at the same moment. The files are those of a job that has succeeded, or nobody's."""
    ask, told, go = Jobs.ask, asyncio.Event(), asyncio.Event()

    async def late(jobs: Jobs, call: Any, *args: Any) -> Any:
        if call is not JobStore.publish:
            return await ask(jobs, call, *args)
        answer = await ask(jobs, call, *args) if first == "publish" else None
        told.set()
        await go.wait()
        return answer or await ask(jobs, call, *args)

    async def story(world: World) -> None:
        job = await world.submit()
        await asyncio.wait_for(told.wait(), 20)
        cancelled = await world.jobs.ask(JobStore.cancel, job.id, None)
        world.runner.drop(job.id)
        go.set()
        async with asyncio.timeout(20):
            while world.runner._running:
                await asyncio.sleep(0.01)
        files = [file.name for file in (tmp_path / "outputs").glob("*.mp4")]
        assert files == [output.name for output in cancelled.outputs]
        assert (cancelled.state, len(files)) == (("succeeded", 1) if first == "publish" else ("cancelled", 0))

    monkeypatch.setattr(Jobs, "ask", late)
    live(tmp_path, draws, story)


def test_files_that_would_have_expired_while_the_store_was_away_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    ask, away = Jobs.ask, True

    async def sometimes(jobs: Jobs, call: Any, *args: Any) -> Any:
        if away and call is JobStore.publish:
            raise JobsUnavailable("away")
        return await ask(jobs, call, *args)

    async def story(world: World) -> None:
        nonlocal away
        job: Job = await world.submit()
        while not (found := list((tmp_path / "outputs").glob("*.mp4"))):
            await asyncio.sleep(0.01)
        os.utime(found[0], (1, 1))
        world.outputs.sweep()
        await asyncio.sleep(0.3)
        assert [file.stat().st_mtime > 1 for file in (tmp_path / "outputs").glob("*.mp4")] == [True]
        away = False
        (output,) = (await world.ended(job)).outputs
        assert output.name == found[0].name
        assert world.outputs.file(output.name).read_bytes() == b"film"

    monkeypatch.setattr(results, "FRESH_S", 0.05)
    monkeypatch.setattr(Jobs, "ask", sometimes)
    live(tmp_path, draws, story)


def test_what_is_written_already_is_published_though_it_cannot_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    """One outage may take the store and the bucket, and a folder may have filled up meanwhile."""
    ask, keep, away = Jobs.ask, OutputStore.keep, True
    refused: list[str] = []

    async def sometimes(jobs: Jobs, call: Any, *args: Any) -> Any:
        if away and call is JobStore.publish:
            raise JobsUnavailable("away")
        return await ask(jobs, call, *args)

    def once(outputs: OutputStore, content: bytes, kind: str, name: str | None = None) -> Any:
        if list((tmp_path / "outputs").glob("*.mp4")):
            refused.append(str(name))
            raise OutputsFull("full")
        return keep(outputs, content, kind, name)

    async def story(world: World) -> None:
        nonlocal away
        job: Job = await world.submit()
        while len(refused) < 2:
            await asyncio.sleep(0.01)
        away = False
        done = await world.ended(job)
        assert (done.state, done.attempt, len(done.outputs)) == ("succeeded", 1, 1)
        assert world.outputs.file(done.outputs[0].name).read_bytes() == b"film"

    monkeypatch.setattr(results, "FRESH_S", 0.05)
    monkeypatch.setattr(results, "AWAY_S", 0.01)
    monkeypatch.setattr(Jobs, "ask", sometimes)
    monkeypatch.setattr(OutputStore, "keep", once)
    live(tmp_path, draws, story)


def _two() -> Any:
    """A result with two files."""
    return type(RESULT)((b"one", b"two"), (7, 8), RESULT.degrees, 0.1, (0.1,), 0.1)
