"""The RPCs of jobs over grpc's own server, without Ray: a job's life, pages, downloads, and what is refused."""

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from service.api import job_calls
from service.api.rest import rest_app
from service.jobs.records import Job
from service.jobs.store import JobStore
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.rpc import jobs
from service.rpc.requests import to_generation, to_job
from tests.support.grpc_calls import Answer, Backend, finished, params, served
from tests.support.hostile import colored
from tests.support.hostile import file as encoded

Stub = services.MediaGenerationServiceStub
OK, UNKNOWN = grpc.StatusCode.OK, f"job_{'0' * 44}"


@pytest.fixture
def jobs_backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(job_calls, "LOOK_S", 0.02)
    return Backend()


def live(backend: Backend, story: Callable[[Stub], Awaitable[None]]) -> None:
    async def run() -> None:
        async with served(backend) as channel:
            await story(Stub(channel))

    asyncio.run(asyncio.wait_for(run(), 60))


async def create(stub: Stub, metadata: Any = (), scheduling: Any = None, **fields: Any) -> pb.Job:
    request = pb.CreateJobRequest(params=params(**fields), scheduling=scheduling)
    return (await stub.CreateJob(request, metadata=metadata)).job


async def watched(stub: Stub, job_id: str) -> list[pb.Job]:
    answer = await finished(stub.WatchJob(pb.WatchJobRequest(id=job_id)))
    assert answer.code == OK, answer.said
    return [message.job for message in answer.messages]


async def downloaded(stub: Stub, job_id: str, **asked: int) -> Answer:
    return await finished(stub.DownloadOutput(pb.DownloadOutputRequest(job_id=job_id, **asked)))


def test_a_job_of_pictures_from_its_begin_to_its_end(jobs_backend: Backend) -> None:
    async def story(stub: Stub) -> None:
        job = await create(stub, n=2, seed=7, output_format="webp", scheduling={"priority": pb.PRIORITY_BATCH})
        assert (job.state, job.scheduling.priority) == (pb.JOB_STATE_QUEUED, pb.PRIORITY_BATCH)
        told = await watched(stub, job.id)
        assert [each.state for each in told][-1] == pb.JOB_STATE_SUCCEEDED
        done = (await stub.GetJob(pb.GetJobRequest(id=job.id))).job
        assert done == told[-1]
        assert (done.attempt, done.progress.step, done.progress.total_steps) == (1, 1, 1)
        assert [(each.seed, each.mime_type, each.total_bytes) for each in done.outputs] == [
            (7, "image/webp", 9), (8, "image/webp", 9),
        ]  # fmt: skip
        assert done.finish_time.ToSeconds() >= done.create_time.ToSeconds() > 0
        assert done.expire_time.ToSeconds() > done.finish_time.ToSeconds()
        assert done.metrics.stage_seconds["denoise"] == 0.5
        files = [await downloaded(stub, job.id, index=index) for index in (0, 1)]
        assert [b"".join(part.chunk.data for part in file.messages) for file in files] == [b"picture 7", b"picture 8"]
        assert [file.messages[0].header for file in files] == list(done.outputs)
        await stub.DeleteJob(pb.DeleteJobRequest(id=job.id))
        gone = await finished(stub.GetJob(pb.GetJobRequest(id=job.id)))
        assert (gone.code, gone.details["ErrorInfo"].reason) == (grpc.StatusCode.NOT_FOUND, "job_not_found")
        assert list(Path(os.environ["SPRAY_OUTPUTS_DIR"]).glob("*.webp")) == []

    live(jobs_backend, story)


def test_a_download_goes_on_where_it_stopped(jobs_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CHUNK_BYTES", 4)

    async def story(stub: Stub) -> None:
        job = await create(stub, seed=7)
        await watched(stub, job.id)
        for offset, rest in ((0, [b"pict", b"ure ", b"7"]), (5, [b"re 7"]), (9, [])):
            header, *chunks = (await downloaded(stub, job.id, offset=offset)).messages
            assert header.header.total_bytes == 9 and not header.HasField("chunk")
            assert [each.chunk.data for each in chunks] == rest
            assert [each.chunk.offset for each in chunks] == [offset + 4 * number for number in range(len(rest))]
        for asked, code, reason in (
            ({"offset": 10}, "INVALID_ARGUMENT", "invalid_value"),
            ({"offset": -1}, "INVALID_ARGUMENT", "invalid_value"),
            ({"index": 1}, "NOT_FOUND", "output_not_found"),
            ({"index": -1}, "NOT_FOUND", "output_not_found"),
        ):
            refused = await downloaded(stub, job.id, **asked)
            assert (refused.code.name, refused.details["ErrorInfo"].reason) == (code, reason)

    live(jobs_backend, story)


def test_one_job_is_known_to_both_apis(jobs_backend: Backend) -> None:
    async def story(stub: Stub) -> None:
        key = [("idempotency-key", "k")]
        first = await create(stub, key, model="film", num_frames=5)  # its seed is drawn
        again = await finished(
            stub.CreateJob(pb.CreateJobRequest(params=params(model="film", num_frames=5)), metadata=key)
        )
        assert (again.messages[0].job.id, again.trailing["idempotency-replayed"]) == (first.id, "true")
        other = await finished(stub.CreateJob(pb.CreateJobRequest(params=params(model="film")), metadata=key))
        assert other.code == OK  # five frames are the default: the same request
        other = await finished(
            stub.CreateJob(pb.CreateJobRequest(params=params(model="film", num_frames=9)), metadata=key)
        )
        assert (other.code.name, other.details["ErrorInfo"].reason) == ("ALREADY_EXISTS", "idempotency_key_reuse")
        await watched(stub, first.id)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(rest_app(jobs_backend)), base_url="http://here"
        ) as client:
            video = (await client.get(f"/v1/videos/{first.id}")).json()
            assert (video["status"], video["seed"]) == ("completed", first.params.seed)
            body = {"model": "film", "prompt": "a"}
            replayed = await client.post("/v1/videos", json=body, headers={"idempotency-key": "k"})
            assert replayed.json()["id"] == first.id
            content = await client.get(f"/v1/videos/{first.id}/content")
            extra = {"model": "film", "prompt": "a", "extra_params": {"eta": 0.5}}
            job_id = (await client.post("/v1/videos", json=extra)).json()["id"]
            assert (await client.get(f"/v1/jobs/{job_id}")).json()["request"]["extra_params"] == {"eta": 0.5}
        told = (await stub.GetJob(pb.GetJobRequest(id=job_id))).job
        assert dict(told.params.extra) == {"eta": 0.5}
        await watched(stub, job_id)
        assert jobs_backend.requests[-1].extra_params == {"eta": 0.5}
        again = await create(stub, model="film", extra={"eta": 0.5, "steps": 3, "fast": True, "mode": "a"})
        await watched(stub, again.id)
        extra = jobs_backend.requests[-1].extra_params
        assert list(map(repr, extra.items())) == ["('eta', 0.5)", "('fast', True)", "('mode', 'a')", "('steps', 3)"]
        (part,) = (await downloaded(stub, first.id)).messages[1:]
        assert part.chunk.data == content.content

    live(jobs_backend, story)


def test_what_a_job_tells_of_itself_asks_for_the_same_again(jobs_backend: Backend) -> None:
    models = jobs_backend.models()
    lora, film = [{"name": "ink", "scale": 0.5}], {"model": "film", "num_frames": 5, "fps": 8, "guidance_scale_2": 2.0}
    for fields in (
        {"n": 2, "seeds": [3, 9], "loras": lora, "output_format": "jpeg", "output_quality": 80, "flow_shift": 3.0},
        {"n": 2, "seed": 3, "true_cfg_scale": 2.0, "negative_prompt": "b"},
        film | {"seed": 0, "guidance_scale": 0.0, "output_format": "mp4"},
    ):
        asked, _, _ = asyncio.run(to_job(pb.CreateJobRequest(params=params(**fields)), models, "x"))

        async def story(stub: Stub, fields: Any = fields, asked: Any = asked) -> None:
            job = await create(stub, **fields)
            again = await to_generation(pb.GenerateStreamRequest(params=job.params), models, "x")
            assert again == asked

        live(jobs_backend, story)


def test_what_a_job_with_inputs_tells_asks_for_the_same_again_with_these(jobs_backend: Backend) -> None:
    models = jobs_backend.models()
    asked = params(strength=0.3, seed=5, width=64, height=64)
    asked.inputs.add(role="image", data=encoded(colored()))

    async def story(stub: Stub) -> None:
        job = (await stub.CreateJob(pb.CreateJobRequest(params=asked))).job
        assert (job.params.task, job.params.strength) == (pb.TASK_UNSPECIFIED, 0.3)
        job.params.inputs.extend(asked.inputs)
        again, first = [
            await to_generation(pb.GenerateStreamRequest(params=each), models, "x") for each in (job.params, asked)
        ]
        assert again == first

    live(jobs_backend, story)


def test_a_job_is_cancelled_while_it_runs_and_watched_meanwhile(jobs_backend: Backend) -> None:
    async def story(stub: Stub) -> None:
        job = await create(stub, prompt="endless")
        watching = stub.WatchJob(pb.WatchJobRequest(id=job.id))
        while (seen := (await watching.read()).job).state != pb.JOB_STATE_RUNNING:
            assert seen.state == pb.JOB_STATE_QUEUED
        waits = await create(stub)
        assert (await stub.GetJob(pb.GetJobRequest(id=waits.id))).job.position == 1
        refused = await downloaded(stub, job.id)
        assert (refused.code.name, refused.details["ErrorInfo"].reason) == ("FAILED_PRECONDITION", "job_not_ready")
        cancelled = (await stub.CancelJob(pb.CancelJobRequest(id=job.id))).job
        assert (cancelled.state, cancelled.error.code) == (pb.JOB_STATE_CANCELLED, "cancelled")
        last = seen
        while (read := await watching.read()) is not grpc.aio.EOF:
            last = read.job
        assert last == cancelled
        assert (await watched(stub, waits.id))[-1].state == pb.JOB_STATE_SUCCEEDED
        assert jobs_backend.closed

    live(jobs_backend, story)


def test_a_job_that_fails_says_why(jobs_backend: Backend) -> None:
    async def story(stub: Stub) -> None:
        job = await create(stub, prompt="failed")
        failed = (await watched(stub, job.id))[-1]
        assert (failed.state, failed.error.code) == (pb.JOB_STATE_FAILED, "generation_failed")
        assert failed.error.message == "rank 1: MemoryError"

    live(jobs_backend, story)


def test_pages_follow_each_other(jobs_backend: Backend) -> None:
    async def story(stub: Stub) -> None:
        made = [(await create(stub, model=model)).id for model in ("one", "film", "one")]
        for job_id in made:
            await watched(stub, job_id)
        first = await stub.ListJobs(pb.ListJobsRequest(page_size=2))
        assert [job.id for job in first.jobs] == made[:0:-1]
        rest = await stub.ListJobs(pb.ListJobsRequest(page_size=2, page_token=first.next_page_token))
        assert ([job.id for job in rest.jobs], rest.next_page_token) == (made[:1], "")
        for state, found in ((pb.JOB_STATE_SUCCEEDED, 3), (pb.JOB_STATE_FAILED, 0)):
            assert len((await stub.ListJobs(pb.ListJobsRequest(state=state))).jobs) == found
        for wrong in ({"page_size": -1}, {"page_size": 101}, {"page_token": "\0"}, {"state": 9}):
            refused = await finished(stub.ListJobs(pb.ListJobsRequest(**wrong)))
            violation = refused.details["BadRequest"].field_violations[0]
            assert (refused.code.name, violation.field) == ("INVALID_ARGUMENT", next(iter(wrong)))

    live(jobs_backend, story)


def test_others_find_nothing(jobs_backend: Backend) -> None:
    async def story(stub: Stub) -> None:
        jobs_backend.key = "ann"
        ann, bob = ([("authorization", f"Bearer {name}")] for name in ("ann", "bob"))
        job = await create(stub, ann)
        jobs_backend.key = "bob"
        said = set()
        for job_id in (job.id, UNKNOWN, "\0"):
            for method, request in (
                (stub.GetJob, pb.GetJobRequest(id=job_id)),
                (stub.WatchJob, pb.WatchJobRequest(id=job_id)),
                (stub.CancelJob, pb.CancelJobRequest(id=job_id)),
                (stub.DeleteJob, pb.DeleteJobRequest(id=job_id)),
                (stub.DownloadOutput, pb.DownloadOutputRequest(job_id=job_id)),
            ):
                answer = await finished(method(request, metadata=bob))
                assert (answer.code.name, answer.details["ErrorInfo"].reason) == ("NOT_FOUND", "job_not_found")
                if job_id != "\0":
                    said.add(answer.said.replace(job_id, ""))
        assert len(said) == 1  # it does not even learn that there is one
        assert list((await stub.ListJobs(pb.ListJobsRequest(), metadata=bob)).jobs) == []
        jobs_backend.key = "ann"
        assert len((await stub.ListJobs(pb.ListJobsRequest(), metadata=ann)).jobs) == 1

    live(jobs_backend, story)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"webhook_url": "https://a.example"}, "webhook_url"),  # no host is allowed here
        ({"labels": {"a": "b"}}, "labels"),
        ({"scheduling": {"priority": 9}}, "scheduling.priority"),
        ({"scheduling": {"deadline_seconds": 0}}, "scheduling.deadline_seconds"),
        ({"params": {"model": "one", "prompt": "a", "num_frames": 5}}, "params.num_frames"),
    ],
)
def test_what_a_job_cannot_be_is_refused(jobs_backend: Backend, wrong: dict[str, Any], field: str) -> None:
    async def story(stub: Stub) -> None:
        request = pb.CreateJobRequest(**{"params": params(), **wrong})
        refused = await finished(stub.CreateJob(request))
        assert refused.code.name == "INVALID_ARGUMENT"
        assert refused.details["BadRequest"].field_violations[0].field == field
        options = pb.StreamOptions(preview_every_n_steps=3)
        watching = await finished(stub.WatchJob(pb.WatchJobRequest(id=UNKNOWN, options=options)))
        assert watching.details["BadRequest"].field_violations[0].field == "options.preview_every_n_steps"
        assert list((await stub.ListJobs(pb.ListJobsRequest())).jobs) == []

    live(jobs_backend, story)


def test_a_webhook_is_that_of_the_job(jobs_backend: Backend) -> None:
    url = "https://hooks.example.com/a"
    jobs_backend.webhooks._hosts = frozenset({"hooks.example.com"})

    async def story(stub: Stub) -> None:
        answer = await stub.CreateJob(pb.CreateJobRequest(params=params(), webhook_url=url))
        assert (await jobs_backend.jobs.ask(JobStore.get, answer.job.id, None)).webhook_url == url

    live(jobs_backend, story)


def test_a_deadline_is_that_of_the_job(jobs_backend: Backend) -> None:
    async def story(stub: Stub) -> None:
        job = await create(stub, prompt="never", scheduling={"deadline_seconds": 1000.0})
        assert job.scheduling.deadline_seconds == 1000
        kept = await jobs_backend.jobs.ask(JobStore.get, job.id, None)
        assert kept.deadline_at == pytest.approx(kept.created_at + 1000)
        await stub.CancelJob(pb.CancelJobRequest(id=job.id))

    live(jobs_backend, story)


def test_a_watch_ends_when_the_gateway_drains_and_hears_of_a_job_that_is_deleted(jobs_backend: Backend) -> None:
    async def story(stub: Stub) -> None:
        job = await create(stub, prompt="never")
        jobs_backend.draining = True
        assert [each.id for each in await watched(stub, job.id)] == [job.id]
        jobs_backend.draining = False
        watching = stub.WatchJob(pb.WatchJobRequest(id=job.id))
        await watching.read()
        await stub.DeleteJob(pb.DeleteJobRequest(id=job.id))
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            while await watching.read() is not grpc.aio.EOF:
                pass
        assert gone.value.code() == grpc.StatusCode.NOT_FOUND

    live(jobs_backend, story)


def test_too_many_watchers_are_refused_and_leave_their_places(
    jobs_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_calls, "MOST_WATCHERS", 1)

    async def story(stub: Stub) -> None:
        job = await create(stub, prompt="never")
        first = stub.WatchJob(pb.WatchJobRequest(id=job.id))
        await first.read()
        refused = await finished(stub.WatchJob(pb.WatchJobRequest(id=job.id)))
        assert (refused.code.name, refused.details["ErrorInfo"].reason) == ("RESOURCE_EXHAUSTED", "queue_full")
        first.cancel()
        while job_calls._watchers:
            await asyncio.sleep(0.01)
        await stub.CancelJob(pb.CancelJobRequest(id=job.id))
        await watched(stub, job.id)

    live(jobs_backend, story)


def test_an_estimate_follows_from_the_steps_that_were_seen() -> None:
    job = dataclasses.replace(_running(), step=1, total_steps=10, fence=1)
    pace = job_calls.Pace()
    assert pace.judge(job_calls.Seen(job)).eta_s is None  # of one look nobody knows
    pace._first = (1, 1, pace._first[2] - 4.0)  # type: ignore[index]  # four seconds ago
    assert pace.judge(job_calls.Seen(dataclasses.replace(job, step=3))).eta_s == pytest.approx(14, abs=0.5)
    again = dataclasses.replace(job, fence=2)
    assert pace.judge(job_calls.Seen(again)).eta_s is None  # another attempt begins anew


def _running() -> Job:
    return Job(UNKNOWN, "video", "film", "", {}, 1, "standard", "running", 0.0)
