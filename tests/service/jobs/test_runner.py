"""What a gateway does with jobs: it runs them, extends their leases, and says how they end."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError

from service.api.backend import Report, Restarted, Waiting
from service.jobs import patience, unserved
from service.jobs import runner as module
from service.jobs.backlog import JobBacklog
from service.jobs.records import Job
from service.jobs.requests import asked_of, new_job
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.state.model_states import ModelState
from service.state.outputs import OutputStore
from tests.service.jobs.gateways import REQUEST, RESULT, Script, World, draws, live, named
from workers.errors import (
    GangLost,
    JobsUnavailable,
    ModelNotFound,
    ModelUnavailable,
    OutputsFull,
    OutputsUnavailable,
    QueueFull,
    RequestFailed,
)
from workers.messages import GenerationRequest, MediaInput

pytestmark = pytest.mark.usefixtures("quick")


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


def test_a_asked_of_another_version_can_be_read() -> None:
    job = Job(
        "job_1", "video", "film", "", {**new_job(REQUEST, "").request, "of_tomorrow": 1}, 1, "standard", "queued", 0.0
    )
    kept = {name: getattr(REQUEST, name) for name in ("prompt", "loras", "seeds", "output_format", "guidance_scale")}
    found = asked_of(job)
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
        ([ModelUnavailable("being deployed")] * 5, "succeeded", None, 1),
        ([RequestFailed("rank 1: MemoryError")], "failed", "generation_failed", 1),
        ([GangLost("twice")], "failed", "request_quarantined", 1),
        ([ZeroDivisionError("secret detail")], "failed", "internal_error", 1),
        ([OutOfMemoryError("secret detail")] * 2, "succeeded", None, 3),
        ([OutOfMemoryError("secret detail")] * 9, "failed", "internal_error", 3),
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


def test_a_model_that_cannot_be_started_is_waited_for_as_long_as_one_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "UNSERVED_S", 0.5)

    async def story(world: World) -> None:
        done = await world.ended(await world.submit())
        assert (done.state, done.error and done.error.code, done.attempt) == ("failed", "model_unavailable", 1)
        assert len(world.asked) > 3
        assert (done.ended_at or 0.0) - done.created_at >= 0.5

    live(tmp_path, failing(*[ModelUnavailable("rank 0: no memory")] * 10_000), story)


def test_who_waits_behind_others_for_a_model_that_cannot_be_started_is_told_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "UNSERVED_S", 1.5)
    monkeypatch.setattr(module, "AGAIN_S", 0.1)

    async def story(world: World) -> None:
        jobs = [await world.submit(replace(REQUEST, prompt=f"number {i}")) for i in range(6)]
        ended = [await world.ended(job) for job in jobs]
        assert {job.error and job.error.code for job in ended} == {"model_unavailable"}
        assert min((job.ended_at or 0.0) - job.created_at for job in ended) >= 1.5
        times = [job.ended_at or 0.0 for job in ended]
        assert max(times) - min(times) < 1.5  # not one after the other, each as long as the first

    live(tmp_path, failing(*[ModelUnavailable("rank 0: no memory")] * 10_000), story)


def test_a_job_that_can_never_begin_ends_although_others_of_its_model_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "UNSERVED_S", 0.5)

    async def script(request: GenerationRequest) -> AsyncGenerator[Report]:
        if request.prompt == "hopeless":
            raise ModelUnavailable("the ranks lack an adapter")
        async for report in draws(request):
            yield report

    async def story(world: World) -> None:
        hopeless = await world.submit(replace(REQUEST, prompt="hopeless"))
        for _ in range(10):
            assert (await world.ended(await world.submit())).state == "succeeded"
            await asyncio.sleep(0.1)
        assert (await world.ended(hopeless)).state == "failed"

    live(tmp_path, script, story)


@pytest.mark.parametrize("error", [OutputsFull("full"), OutputsUnavailable("away"), OSError(5, "Input/output error")])
def test_nothing_is_drawn_before_there_is_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    looks, prepare = 0, OutputStore.prepare

    def sometimes(outputs: OutputStore, outputs_only: bool = False) -> None:
        nonlocal looks
        looks += 1
        if looks <= 5:
            raise error
        prepare(outputs, outputs_only)

    monkeypatch.setattr(OutputStore, "prepare", sometimes)
    held: list[bool] = []  # whether the jobs that wait are kept from the autoscaler
    monkeypatch.setattr(JobBacklog, "hold", lambda backlog: held.append(True))
    monkeypatch.setattr(JobBacklog, "release", lambda backlog: held.append(False))

    async def story(world: World) -> None:
        done = await world.ended(await world.submit())
        assert held == [True] * 5 + [False]
        assert (done.state, done.attempt, len(world.asked), looks) == ("succeeded", 1, 1, 6)

    live(tmp_path, draws, story)


def test_a_queue_that_cannot_be_begun_is_not_run_through_without_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0.5)
    monkeypatch.setattr(module, "AGAIN_S", 60.0)

    async def story(world: World) -> None:
        for _ in range(20):
            await world.jobs.ask(JobStore.submit, new_job(REQUEST, "ann"))
        world.runner.wake()
        await asyncio.sleep(1.2)
        assert 1 <= len(world.asked) <= 4

    live(tmp_path, failing(*[QueueFull("full")] * 100), story)


def test_jobs_run_though_what_they_begin_with_takes_all_that_may_be_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.outputs.follow(str(tmp_path / "outputs"), 1000.0, max_bytes=10)
        job = await world.submit(replace(REQUEST, inputs=(MediaInput("image", b"a" * 100),)))
        assert (await world.ended(job)).state == "succeeded"
        world.outputs.keep(b"a" * 11, "png")
        late = await world.submit()
        await world.until(late, lambda found: found.fence >= 3)
        assert len(world.asked) == 1

    live(tmp_path, draws, story)


@pytest.mark.parametrize("off_s", [-3600.0, 3600.0])
def test_a_deadline_is_that_of_the_store_whatever_its_clock_says(tmp_path: Path, off_s: float) -> None:
    async def story(world: World) -> None:
        await world.jobs.ask(JobStore.counts)
        assert world.jobs._own is not None
        world.jobs._own._database._clock = lambda: time.time() + off_s
        job = await world.submit(deadline_s=100.0)
        assert (await world.ended(job)).state == "succeeded"
        ((_, asked),) = world.asked
        assert asked.deadline_at == pytest.approx(time.time() + 100.0, abs=30.0)

    live(tmp_path, draws, story)


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
    def full(outputs: OutputStore, content: bytes, kind: str, name: str) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OutputStore, "keep", full)

    async def story(world: World) -> None:
        done = await world.ended(await world.submit())
        assert (done.state, done.attempt) == ("failed", 3)
        assert done.error is not None
        assert "No space left on device" in done.error.message

    live(tmp_path, draws, story)


def test_jobs_of_a_model_that_is_gone_wait_for_it_and_then_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)
    monkeypatch.setattr(unserved, "UNSERVED_S", 0.4)

    async def story(world: World) -> None:
        world.models, world.room = {}, {}
        mistaken = await world.submit()
        async with asyncio.timeout(20):
            while not world.runner._unserved._since:
                await asyncio.sleep(0.01)
        world.models, world.room = {"film": named("film")}, {"film": 1}  # the operator has put it right
        world.runner.wake()
        assert (await world.ended(mistaken)).state == "succeeded"
        world.models, world.room = {}, {}
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


def test_jobs_of_a_former_name_are_run_by_the_model_that_has_it_as_an_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)

    async def story(world: World) -> None:
        world.models, world.room = {}, {}
        job = await world.submit()
        world.models = {"cinema": named("cinema", "film", "movie"), "draw": named("draw")}
        world.room = {"cinema": 1, "draw": 1}
        world.runner.wake()
        done = await world.ended(job)
        assert (done.state, done.model) == ("succeeded", "cinema")
        assert [request.model for _, request in world.asked] == ["cinema"]

    live(tmp_path, draws, story)


def test_in_a_shared_store_nothing_of_others_is_renamed_or_ended_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)
    monkeypatch.setattr(Jobs, "shared", property(lambda jobs: True))
    monkeypatch.setattr(unserved, "UNSERVED_S", 0.3)
    monkeypatch.setattr(unserved, "SHARED_UNSERVED_S", 0.9)

    async def story(world: World) -> None:
        world.models, world.room = {"cinema": named("cinema", "film")}, {"cinema": 1}
        renamed, other = await world.submit(), await world.submit(replace(REQUEST, model="play"))
        done = {}
        async with asyncio.timeout(30):
            while len(done) < 2:
                for job in (renamed, other):
                    if (found := await world.jobs.ask(JobStore.get, job.id, None)).ended:
                        done[job.id] = found
                world.runner.wake()
                await asyncio.sleep(0.02)
        drawn, failed = done[renamed.id], done[other.id]
        assert (drawn.state, drawn.model, failed.state) == ("succeeded", "cinema", "failed")
        assert (drawn.started_at or 0.0) - drawn.created_at >= 0.3
        assert (failed.ended_at or 0.0) - failed.created_at >= 0.9

    live(tmp_path, draws, story)


def test_a_claim_that_is_not_answered_costs_no_attempt_and_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.0)

    async def story(world: World) -> None:
        ask, lost = world.jobs.ask, 0

        async def answer_is_lost(call: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal lost
            found = await ask(call, *args, **kwargs)
            if call is JobStore.claim and found and lost < 3:
                lost += 1
                return []  # as the store says when it is asked again: nothing is free anymore
            return found

        monkeypatch.setattr(world.jobs, "ask", answer_is_lost)
        done = await world.ended(await world.submit())
        assert (done.state, done.attempt, lost) == ("succeeded", 1, 3)

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
