"""What jobs begin with: files beside the outputs that are there before their job, and go after it."""

import asyncio
import base64
import hashlib
import json
import pickle
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.api.backend import Report
from service.jobs import inputs, runner
from service.jobs.inputs import STRAY_S, keep, request_of
from service.jobs.records import Job, NewJob
from service.jobs.requests import new_job
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.state import outputs as module
from service.state.outputs import OutputStore, new_input_name
from tests.service.jobs.gateways import REQUEST, RESULT, Script, World, draws, live
from tests.service.jobs.stores import BROKEN, KEEP_S, Clock, take
from tests.service.jobs.stores import new_job as any_job
from workers.errors import InputNotFound, JobsUnavailable, OutputNotFound, OutputsFull, OutputsUnavailable
from workers.messages import GenerationRequest, MediaInput

pytestmark = pytest.mark.usefixtures("quick")

FIRST, LAST = b"the first picture", b"the last picture"
EDIT = replace(REQUEST, inputs=(MediaInput("image", FIRST), MediaInput("last_image", LAST)))
LONG_AGO = -1.0
"""For `STRAY_S`: every file without a job has been there for long enough."""


def files(folder: Path) -> list[bytes]:
    return sorted(file.read_bytes() for file in (folder / "outputs").glob("*.input*"))


def stored(new: NewJob, **changes: Any) -> Job:
    """The job that a store has of a new one."""
    kept = json.loads(json.dumps(dict(new.request)))
    return replace(Job(new.id, "video", "film", "", kept, 1, "standard", "running", 0.0, fence=2), **changes)


def test_a_row_says_which_files_a_job_begins_with_and_has_none_of_them(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        job = await world.submit(EDIT)
        rows = job.request["inputs"]
        assert [row.keys() for row in rows] == [{"role", "name", "sha256", "size"}] * 2
        assert [(row["role"], row["size"]) for row in rows] == [("image", len(FIRST)), ("last_image", len(LAST))]
        assert [row["sha256"] for row in rows] == [hashlib.sha256(data).hexdigest() for data in (FIRST, LAST)]
        assert (tmp_path / "outputs" / rows[0]["name"]).read_bytes() == FIRST
        assert (await world.ended(job)).state == "succeeded"
        ((_, asked),) = world.asked
        assert asked.inputs == EDIT.inputs
        assert files(tmp_path) == sorted([FIRST, LAST])  # the job may be remixed

    live(tmp_path, draws, story)


@pytest.mark.parametrize(
    ("wrong", "said"), [("changed", "was changed"), ("cut", "was changed"), ("missing", "not kept here")]
)
def test_no_other_picture_is_ever_drawn(tmp_path: Path, wrong: str, said: str) -> None:
    async def story(world: World) -> None:
        room, world.room = world.room, {}
        job = await world.submit(EDIT)
        file = tmp_path / "outputs" / job.request["inputs"][1]["name"]
        if wrong == "missing":
            file.unlink()
        else:
            file.write_bytes(LAST[:-1] if wrong == "cut" else FIRST)
        world.room = room
        world.runner.wake()
        done = await world.ended(job)
        assert (done.state, done.error and done.error.code) == ("failed", "input_not_found")
        assert done.error is not None
        assert said in done.error.message and "last_image" in done.error.message
        assert world.asked == []

    live(tmp_path, draws, story)


@pytest.mark.parametrize("error", [OutputsUnavailable("away"), PermissionError(13, "Permission denied")])
def test_what_cannot_be_read_now_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    read, refused = OutputStore.input, []

    def sometimes(outputs: OutputStore, name: str) -> Any:
        if len(refused) < 5:
            refused.append(name)
            raise error
        return read(outputs, name)

    monkeypatch.setattr(OutputStore, "input", sometimes)

    async def story(world: World) -> None:
        done = await world.ended(await world.submit(EDIT))
        assert (done.state, done.attempt, len(refused)) == ("succeeded", 1, 5)
        ((_, asked),) = world.asked
        assert asked.inputs == EDIT.inputs

    live(tmp_path, draws, story)


def run(outputs: OutputStore, job: Job) -> GenerationRequest:
    """What a job asks whose store has nothing of it."""
    jobs = Jobs()
    return asyncio.run(request_of(jobs, outputs, job))


def test_a_row_of_an_older_version_has_the_pictures_in_it() -> None:
    old = [{"role": each.role, "data": base64.b64encode(each.data).decode()} for each in EDIT.inputs]
    new = new_job(EDIT, "")
    job = stored(replace(new, request={**new.request, "inputs": old}))
    found = run(OutputStore(), job)
    assert found == replace(EDIT, request_id=f"{new.id}-2", report_steps=True, priority="standard")
    before = {name: value for name, value in new.request.items() if name not in ("inputs", "strength")}  # older still
    assert run(OutputStore(), replace(job, request=before)).inputs == ()


def test_a_job_whose_pictures_nobody_has_kept_cannot_be_run() -> None:
    with pytest.raises(InputNotFound, match="image"):
        run(OutputStore(), stored(new_job(EDIT, "")))


def test_a_place_that_may_end_with_the_cluster_keeps_no_pictures_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path / "own"))
    away, ask = 3, Jobs.ask

    async def sometimes(jobs: Jobs, call: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal away
        if call is JobStore.input_data and (away := away - 1) >= 0:
            raise JobsUnavailable("away")
        return await ask(jobs, call, *args, **kwargs)

    monkeypatch.setattr(Jobs, "ask", sometimes)

    async def story(world: World) -> None:
        world.outputs.follow(None, 1000.0)
        job = await world.submit(EDIT)
        assert [row.keys() for row in job.request["inputs"]] == [{"role", "sha256", "size"}] * 2
        done = await world.ended(job)
        assert (done.state, done.attempt) == ("succeeded", 1)
        ((_, asked),) = world.asked
        assert asked.inputs == EDIT.inputs
        assert list((tmp_path / "own").glob("*.input*")) == []
        rows = [row | {"sha256": "0" * 64} for row in done.request["inputs"]]
        with pytest.raises(InputNotFound, match="was changed"):
            await request_of(world.jobs, world.outputs, replace(done, request={**done.request, "inputs": rows}))
        await world.jobs.ask(JobStore.delete, job.id, None)
        with pytest.raises(InputNotFound, match="not kept here"):
            await request_of(world.jobs, world.outputs, done)

    live(tmp_path, draws, story)


def test_what_lies_in_no_file_is_read_by_those_alone_who_ask_for_it(store: JobStore, clock: Clock) -> None:
    big = tuple(bytes([each]) * 100_000 for each in (1, 2))
    new = replace(any_job(owner="ann"), input_data=big)
    read: list[str] = []
    sa.event.listen(
        store._database._engine, "before_cursor_execute", lambda _, __, statement, *more: read.append(statement)
    )
    for _ in range(2):  # told again
        store.submit(new)
    del read[:]
    (held,) = take(store)
    store.look(new.id, "ann")
    store.page("ann")
    renewed = store.renew(held.id, held.fence, 30.0, 1, 4)
    assert len(pickle.dumps((held, renewed))) < 10_000
    assert read and not any("job_input_data" in statement for statement in read)
    assert store.input_data(new.id) == dict(enumerate(big))
    store.fail(held.id, held.fence, BROKEN)
    clock.now += KEEP_S
    store.sweep()
    assert store.input_data(new.id) == {}


def test_a_full_disk_leaves_nothing_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = 0

    def full(_: int) -> None:
        nonlocal synced
        synced += 1
        if synced > 2:  # the first file, and its folder
            raise OSError(28, "No space left on device")

    async def story(world: World) -> None:
        world.outputs.prepare()
        monkeypatch.setattr("service.state.output_folder.os.fsync", full)
        with pytest.raises(OutputsFull):
            await world.submit(EDIT)
        assert synced == 3
        assert files(tmp_path) == []
        assert (await world.jobs.ask(JobStore.page, None)).jobs == ()

    live(tmp_path, draws, story)


def test_files_that_no_job_has_are_swept_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SWEEP_S", 0.0)
    monkeypatch.setattr(runner, "INPUTS_S", 0.0)

    async def gone(world: World, left: list[bytes]) -> None:
        world.runner.wake()
        async with asyncio.timeout(20):
            while files(tmp_path) != left:
                await asyncio.sleep(0.02)

    async def story(world: World) -> None:
        lost = replace(EDIT, inputs=(MediaInput("image", b"of a gateway that died before it had submitted"),))
        await keep(world.jobs, world.outputs, new_job(lost, "ann"), lost.inputs)
        job = await world.submit(EDIT)
        await world.ended(job)
        await asyncio.sleep(0.3)
        assert len(files(tmp_path)) == 3  # a submission takes a while
        monkeypatch.setattr(inputs, "STRAY_S", LONG_AGO)
        await gone(world, sorted([FIRST, LAST]))
        assert await world.jobs.ask(JobStore.stray_inputs, LONG_AGO, 100) == []
        world.jobs._keep_s = 0.1
        other = await world.submit()
        await world.ended(other)  # expires at once
        assert files(tmp_path) == sorted([FIRST, LAST])
        await world.jobs.ask(JobStore.delete, job.id, None)  # its gateway died before it had removed them
        await gone(world, [])

    live(tmp_path, draws, story)


def test_a_sweep_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(outputs: OutputStore, name: str) -> None:
        raise OutputsUnavailable("away")

    async def story(world: World) -> None:
        await keep(world.jobs, world.outputs, new_job(EDIT, "ann"), EDIT.inputs)
        monkeypatch.setattr(inputs, "STRAY_S", LONG_AGO)
        with monkeypatch.context() as broken:
            broken.setattr(OutputStore, "discard", away)
            await inputs.sweep(world.jobs, world.outputs)
        assert len(files(tmp_path)) == 2
        await inputs.sweep(world.jobs, world.outputs)
        assert files(tmp_path) == []

    live(tmp_path, draws, story)


def test_they_take_of_what_may_be_kept_and_no_age_removes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        world.outputs.follow(str(tmp_path / "outputs"), 50.0, max_bytes=1 << 20)
        world.outputs.prepare()
        world.outputs.keep_input(name := new_input_name(), b"a" * (2 << 20))
        with pytest.raises(OutputsFull, match="1048576 bytes"):
            world.outputs.prepare()
        now = module.time.time()
        monkeypatch.setattr(module.time, "time", lambda: now + 1e6)
        world.outputs.sweep()
        with pytest.raises(OutputsFull, match="1048576 bytes"):  # counted anew
            world.outputs.prepare()
        assert world.outputs.input(name).size == 2 << 20
        for wrong in ("../key", "key", "x" * 32 + ".png"):
            with pytest.raises(OutputNotFound):
                world.outputs.input(wrong)
        with pytest.raises(OutputNotFound):  # no URL leads to it, not even a signed one
            world.outputs.find(name, "9" * 12, world.outputs._sign(name, int("9" * 12)))
        world.outputs.discard(name)
        world.outputs.sweep()
        world.outputs.prepare()

    live(tmp_path, draws, story)


def test_the_store_knows_which_files_have_no_job(store: JobStore, clock: Clock) -> None:
    new = any_job()
    for _ in range(2):  # told again: the first answer was lost
        store.note_inputs(new.id, ["a.input", "b.input"])
    clock.now += 10
    store.note_inputs("job_of_nobody", ["c.input"])
    assert store.stray_inputs(10, 100) == ["a.input", "b.input"]
    assert store.stray_inputs(0, 100) == ["a.input", "b.input", "c.input"]
    assert store.stray_inputs(0, 1) == ["a.input"]
    store.submit(new)
    assert store.stray_inputs(0, 100) == ["c.input"]
    store.forget_inputs(["c.input", "d.input"])
    assert store.stray_inputs(0, 100) == []
    store.cancel(new.id, None)
    assert store.stray_inputs(0, 100) == []
    clock.now += KEEP_S + 1
    store.sweep()
    assert store.stray_inputs(STRAY_S, 100) == []
    clock.now += STRAY_S
    assert sorted(store.stray_inputs(STRAY_S, 100)) == ["a.input", "b.input"]


def test_a_job_is_taken_over_with_its_pictures(tmp_path: Path) -> None:
    """Any gateway of the deployment reads them, also a later one."""

    async def hangs(request: GenerationRequest) -> AsyncGenerator[Report]:
        await asyncio.Event().wait()
        yield RESULT

    async def story(world: World) -> None:
        job = await world.submit(EDIT)
        async with asyncio.timeout(20):
            while not world.asked:
                await asyncio.sleep(0.01)
        await world.runner.stop()
        script: Script = draws
        world.script, world.outputs = script, OutputStore()
        world.outputs.follow(str(tmp_path / "outputs"), 1000.0)
        world.another("gateway-2").wake()
        assert (await world.ended(job)).runner == "gateway-2"
        assert [request.inputs for _, request in world.asked] == [EDIT.inputs] * 2

    live(tmp_path, hangs, story)
