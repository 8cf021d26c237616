"""`/v1/jobs`, jobs of pictures, events and remixes, on a gateway without Ray."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from deploy.model_sections import Limits
from service.api import job_calls
from service.api.answers import JobObject
from service.api.observed import key_name
from service.api.rest import rest_app
from service.jobs.records import Job
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from tests.support.backend import FakeBackend
from tests.support.in_process import served
from workers.errors import DeadlineExceeded, OutputsFull, OutputsUnavailable, RateLimited
from workers.messages import GenerationRequest

BODY = {"model": "one", "prompt": "a cup", "seed": 7}
ASYNC = {"prefer": "respond-async"}
pytestmark = pytest.mark.timeout(120)  # a stream that does not end would be read for ever

UNKNOWN = f"job_{'0' * 44}"


@pytest.fixture
def jobs_backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    monkeypatch.setattr(job_calls, "LOOK_S", 0.02)
    return FakeBackend()


@pytest.fixture
def client(jobs_backend: FakeBackend) -> Iterator[httpx.Client]:
    with (
        served(rest_app(jobs_backend)) as url,
        httpx.Client(base_url=f"{url}/v1", trust_env=False, timeout=60) as client,
    ):
        yield client


def accept(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/images/generations", json=BODY | body, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def until(client: httpx.Client, job_id: str, *states: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while (job := client.get(f"/jobs/{job_id}").json())["state"] not in states:
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return dict(job)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream that ended with its job. Each says its name twice."""
    *blocks, last, nothing = text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    found = []
    for block in blocks:
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize("preference", ["respond-async", "wait=10, Respond-Async; x=1"])
def test_pictures_are_a_job_where_the_caller_prefers_it(client: httpx.Client, preference: str) -> None:
    body = BODY | {"n": 2, "output_format": "webp", "priority": "interactive", "deadline_s": 100, "user": "u"}
    answer = client.post("/images/generations", json=body, headers={"prefer": preference})
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
    assert answer.headers["x-ignored-params"] == "user"
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["state"], job["priority"]) == ("image", "queued", "interactive")
    assert job["deadline_at"] == pytest.approx(job["created_at"] + 100)
    done = until(client, job["id"], "succeeded")
    JobObject.model_validate(done)
    assert (done["progress"], done["attempt"], done["request"]["seeds"]) == (100, 1, [7, 8])
    assert [(file["seed"], file["bytes"], file["output_format"]) for file in done["outputs"]] == [
        (7, 9, "webp"), (8, 9, "webp"),
    ]  # fmt: skip
    for index, content in ((0, b"picture 7"), (1, b"picture 8")):
        file = client.get(f"/jobs/{job['id']}/content", params={"index": index})
        assert (file.content, file.headers["content-type"]) == (content, "image/webp")
    assert file.headers["content-disposition"] == f'attachment; filename="{job["id"]}-1.webp"'
    part = client.get(f"/jobs/{job['id']}/content", headers={"range": "bytes=8-"})
    assert (part.status_code, part.content) == (206, b"7")
    for wrong, status, code in (({"index": 2}, 404, "output_not_found"), ({"index": -1}, 400, "invalid_value")):
        refused = client.get(f"/jobs/{job['id']}/content", params=wrong)
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)


def test_without_the_preference_pictures_come_at_once(client: httpx.Client) -> None:
    answer = client.post("/images/generations", json=BODY, headers={"prefer": "wait=10"})
    assert (answer.status_code, "preference-applied" in answer.headers) == (200, False)
    assert client.get("/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("headers", "wrong"),
    [
        (ASYNC, {"stream": True}),
        (ASYNC, {"response_format": "url"}),
        (ASYNC, {"response_format": "b64_json"}),
        (ASYNC, {"deadline_s": 0}),
        (ASYNC, {"partial_images": 1}),
        ({}, {"priority": "batch"}),
        ({}, {"deadline_s": 10}),
        ({}, {"webhook_url": "https://hooks.example.com/"}),
    ],
)
def test_what_does_not_go_together_is_refused(
    client: httpx.Client, headers: dict[str, str], wrong: dict[str, Any]
) -> None:
    answer = client.post("/images/generations", json=BODY | wrong, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(wrong)))
    assert client.get("/jobs").json()["data"] == []


def test_the_same_key_is_the_same_job(client: httpx.Client) -> None:
    body, key = {"model": "one", "prompt": "a"}, ASYNC | {"idempotency-key": "k"}
    first, again = (client.post("/images/generations", json=body, headers=key) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    assert [each.headers.get("idempotency-replayed") for each in (first, again)] == [None, "true"]
    other = client.post("/images/generations", json=body | {"n": 2}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reuse")


def test_of_two_first_calls_with_a_key_one_pays(
    client: httpx.Client, jobs_backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither finds the other's job before it submits its own."""
    paid: list[bool] = []

    @contextlib.contextmanager
    def charge(request: Any) -> Iterator[None]:
        paid.append(False)
        yield
        paid[-1] = True

    monkeypatch.setattr(jobs_backend, "charge", charge)
    monkeypatch.setattr(JobStore, "known", lambda *_: None)
    answers = [client.post("/images/generations", json=BODY, headers=ASYNC | {"idempotency-key": "k"}) for _ in "ab"]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert paid == [True, False]


@pytest.mark.parametrize("behind", [0, 4], ids=["at once", "behind others"])
def test_who_leaves_while_a_job_is_kept_pays_for_it(monkeypatch: pytest.MonkeyPatch, behind: int) -> None:
    """It is accepted all the same, also if the store was busy: to leave must not be a way to have it for nothing."""
    paid: list[bool] = []
    keeping, submitted = threading.Event(), JobStore.submit

    @contextlib.contextmanager
    def charge(request: Any) -> Iterator[None]:
        paid.append(False)
        mine = len(paid) - 1
        yield
        paid[mine] = True

    def slow(store: JobStore, new: Job) -> Any:
        keeping.set()
        time.sleep(0.5)
        return submitted(store, new)

    async def counted(jobs: Jobs, call: Any, *args: Any, **named: Any) -> Any:
        asked.append(call)
        return await ask(jobs, call, *args, **named)

    ask, asked = Jobs.ask, list[Any]()
    monkeypatch.setattr(JobStore, "submit", slow)
    monkeypatch.setattr(Jobs, "ask", counted)

    async def story() -> None:
        backend = FakeBackend()
        monkeypatch.setattr(backend, "charge", charge)
        request = GenerationRequest("a", "one", "a cup", 64, 64, 2, seed=1)
        calls = [
            asyncio.create_task(job_calls.submit(backend, request, "standard", None, None)) for _ in range(behind + 1)
        ]
        assert await asyncio.to_thread(keeping.wait, 60)
        while asked.count(slow) <= behind:
            await asyncio.sleep(0.01)
        calls[-1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[-1]
        await asyncio.gather(*calls[:-1])
        assert paid == [True] * (behind + 1)
        async with asyncio.timeout(60):
            while len((await backend.jobs.ask(JobStore.page, None, limit=10)).jobs) <= behind:
                await asyncio.sleep(0.05)

    asyncio.run(story())


@pytest.mark.parametrize("refusal", ["no work left", "full", "late"])
def test_what_was_accepted_with_a_key_is_not_charged_again_nor_refused(
    client: httpx.Client, jobs_backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    charged: list[Any] = []

    @contextlib.contextmanager
    def charge(request: Any) -> Iterator[None]:
        if charged and refusal == "no work left":
            raise RateLimited("used up")
        charged.append(request)
        yield

    monkeypatch.setattr(jobs_backend, "charge", charge)
    body, key = BODY | {"deadline_s": 100}, ASYNC | {"idempotency-key": "k"}
    first = client.post("/images/generations", json=body, headers=key).json()["id"]
    until(client, first, "succeeded")
    if refusal == "full":
        monkeypatch.setattr(jobs_backend.outputs, "prepare", raising(OutputsFull("full")))
    if refusal == "late":
        monkeypatch.setattr(jobs_backend, "check_job", raising(DeadlineExceeded("too late")))
    again = client.post("/images/generations", json=body, headers=key)
    assert (again.status_code, again.json().get("id"), len(charged)) == (202, first, 1), again.text
    other = client.post("/images/generations", json=body | {"n": 2}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reuse")
    new = client.post("/images/generations", json=body, headers=ASYNC)
    assert new.status_code in (429, 504, 507)


def raising(error: Exception) -> Any:
    """A call that does no more."""

    def call(*args: Any) -> Any:
        raise error

    return call


def test_a_job_is_deleted_though_its_files_cannot_be_removed_now(
    client: httpx.Client, jobs_backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = accept(client)
    until(client, job["id"], "succeeded")
    monkeypatch.setattr(jobs_backend.outputs, "discard", raising(OutputsUnavailable("away")))
    assert client.delete(f"/jobs/{job['id']}").is_success
    assert client.get(f"/jobs/{job['id']}").status_code == 404


def test_who_cancels_the_request_of_a_job_cancels_the_job(client: httpx.Client) -> None:
    job = accept(client, prompt="never")
    until(client, job["id"], "running")
    deadline = time.monotonic() + 30
    while not (found := client.get("/requests").json()["data"]):
        assert time.monotonic() < deadline
    assert client.delete(f"/requests/{found[0]['id']}").is_success
    assert until(client, job["id"], "cancelled", "failed")["state"] == "cancelled"


def test_the_same_key_with_another_webhook_is_another_request(
    client: httpx.Client, jobs_backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_backend.webhooks, "check", lambda url: None)
    body, key = {"model": "one", "prompt": "a"}, ASYNC | {"idempotency-key": "k"}
    hooks = {"webhook_url": "https://a.example/"}, {"webhook_url": "https://b.example/"}
    answers = [client.post("/images/generations", json=body | hook, headers=key) for hook in (*hooks, {}, hooks[0])]
    assert [answer.status_code for answer in answers] == [202, 422, 422, 202]
    assert answers[0].json()["id"] == answers[-1].json()["id"]


def test_a_deadline_that_cannot_be_met_is_refused_unless_the_job_is_there(client: httpx.Client) -> None:
    body, key = BODY | {"prompt": "late"}, ASYNC | {"idempotency-key": "k"}
    accepted = client.post("/images/generations", json=body, headers=key).json()
    refused = client.post("/images/generations", json=body | {"deadline_s": 5}, headers=ASYNC)
    assert (refused.status_code, refused.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "about 9.0 s" in refused.json()["error"]["message"]
    again = client.post("/images/generations", json=body | {"deadline_s": 5}, headers=key)
    assert (again.status_code, again.json()["id"]) == (202, accepted["id"])
    assert [job["id"] for job in client.get("/jobs").json()["data"]] == [accepted["id"]]


def test_a_job_names_who_hears_of_its_end(client: httpx.Client, jobs_backend: FakeBackend) -> None:
    url, film = "https://hooks.example.com/a", {"model": "film", "prompt": "a"}
    off = client.post("/videos", json=film | {"webhook_url": url})
    assert (off.status_code, off.json()["error"]["param"]) == (400, "webhook_url")
    jobs_backend.webhooks._hosts = frozenset({"hooks.example.com"})
    made = [
        accept(client, webhook_url=url),
        client.post("/videos", json=film | {"webhook_url": url}).json(),
        client.post("/videos", json=film).json(),
    ]
    made.append(client.post(f"/videos/{made[1]['id']}/remix", json={"prompt": "b", "webhook_url": url}).json())
    kept = [asyncio.run(jobs_backend.jobs.ask(JobStore.get, job["id"], None)).webhook_url for job in made]
    assert kept == [url, url, None, url]
    wrong = client.post("/images/generations", json=BODY | {"webhook_url": "https://other.example/"}, headers=ASYNC)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "webhook_url")
    assert "hooks.example.com" in wrong.json()["error"]["message"]


def test_all_kinds_are_listed_filtered_cancelled_and_deleted(client: httpx.Client) -> None:
    film = client.post("/videos", json={"model": "film", "prompt": "a"}).json()["id"]
    until(client, film, "succeeded")
    never = accept(client, prompt="never")["id"]
    until(client, never, "running")
    waits = accept(client)["id"]
    assert client.get(f"/jobs/{waits}").json()["position"] == 1
    listed = client.get("/jobs", params={"limit": 2}).json()
    assert ([job["id"] for job in listed["data"]], listed["has_more"]) == ([waits, never], True)
    rest = client.get("/jobs", params={"after": listed["last_id"]}).json()
    assert [(job["id"], job["kind"]) for job in rest["data"]] == [(film, "video")]
    for asked, found in (
        ({"kind": "image"}, [waits, never]),
        ({"state": "running"}, [never]),
        ({"order": "asc"}, [film, never, waits]),
    ):
        assert [job["id"] for job in client.get("/jobs", params=asked).json()["data"]] == found
    assert client.get(f"/videos/{waits}").status_code == 404  # it is no video
    cancelled = client.post(f"/jobs/{never}/cancel").json()
    assert (cancelled["state"], cancelled["error"]["code"]) == ("cancelled", "cancelled")
    until(client, waits, "succeeded")
    assert client.delete(f"/jobs/{waits}").json() == {"id": waits, "object": "job.deleted", "deleted": True}
    gone = client.get(f"/jobs/{waits}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "job_not_found")
    for wrong in ({"kind": "sound"}, {"state": "done"}, {"limit": 0}, {"after": "\0"}):
        refused = client.get("/jobs", params=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(wrong)))


def test_events_tell_a_job_up_to_its_end(client: httpx.Client, jobs_backend: FakeBackend) -> None:
    job = accept(client, prompt="slow")["id"]
    until(client, job, "running")
    waits = accept(client)["id"]
    told: dict[str, list[dict[str, Any]]] = {}
    with client.stream("GET", f"/jobs/{waits}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        head = [next(lines), next(lines)]
        assert head[0] == "event: job.queued"
        first = json.loads(head[1].removeprefix("data: "))
        assert (first["job"]["position"], first["eta_seconds"]) == (1, None)
        client.post(f"/jobs/{job}/cancel")
        told[waits] = events("\n".join([*head, *lines, ""]))
    told[job] = events(client.get(f"/jobs/{job}/events").text)
    assert [event["type"] for event in told[job]] == ["job.cancelled"]
    kinds = [event["type"] for event in told[waits]]
    assert kinds == sorted(kinds, key=["job.queued", "job.running", "job.succeeded"].index)
    assert told[waits][-1]["job"] == client.get(f"/jobs/{waits}").json()


def test_events_tell_steps_and_what_is_left(client: httpx.Client, jobs_backend: FakeBackend) -> None:
    """As a runner elsewhere writes them down."""

    def ask(call: Any, *args: Any) -> Any:
        return asyncio.run(jobs_backend.jobs.ask(call, *args))

    jobs_backend.found = {}  # nobody here takes jobs
    jobs_backend.room = dict  # type: ignore[method-assign]
    jobs_backend.runner._room = dict
    job = client.post("/videos", json={"model": "film", "prompt": "a"}).json()["id"]
    (held,) = ask(JobStore.claim, {"film": 1}, "elsewhere", 60.0)
    with client.stream("GET", f"/videos/{job}/events") as stream:
        lines, told = stream.iter_lines(), []
        for step in range(3):
            ask(JobStore.renew, job, held.fence, 60.0, step, 4)
            while not (line := next(lines)).startswith("data: ") or json.loads(line[6:])["video"]["step"] != step:
                pass
            told.append(json.loads(line[6:]))
        ask(JobStore.cancel, job, None)
        rest = "\n".join([*lines, ""])
    assert [event["type"] for event in told] == ["video.in_progress"] * 3
    assert [event["video"]["progress"] for event in told] == [0, 25, 50]
    assert [event["eta_seconds"] is None for event in told] == [True, True, False]
    assert events(rest.lstrip("\n"))[-1]["video"]["error"]["code"] == "cancelled"


def test_events_end_without_done_when_the_gateway_drains_or_the_job_is_deleted(
    client: httpx.Client, jobs_backend: FakeBackend
) -> None:
    job = accept(client, prompt="never")["id"]
    with client.stream("GET", f"/jobs/{job}/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        client.delete(f"/jobs/{job}")
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert json.loads(last[6:])["error"]["code"] == "job_not_found"
    job = accept(client, prompt="never")["id"]
    jobs_backend.draining = True
    text = client.get(f"/jobs/{job}/events").text
    assert "event: job." in text and "[DONE]" not in text


def test_whoever_watches_no_longer_takes_no_place(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_calls, "MOST_WATCHERS", 1)
    job = accept(client, prompt="never")["id"]
    with client.stream("GET", f"/jobs/{job}/events") as stream:
        lines = stream.iter_lines()  # kept: a stream closes with its iterator
        next(lines)
        refused = client.get(f"/jobs/{job}/events")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    deadline = time.monotonic() + 30
    while job_calls._watchers:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for path in ("jobs", "videos"):
        assert client.get(f"/{path}/{UNKNOWN}/events").status_code == 404


def test_a_key_watches_up_to_its_share(
    client: httpx.Client, jobs_backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_calls, "MOST_OF_ONE", 1)
    monkeypatch.setattr(jobs_backend, "admit", lambda key, admin=False: key_name.set(key or ""))
    job = accept(client, prompt="never")["id"]
    url, mine, others = f"/jobs/{job}/events", {"authorization": "mine"}, {"authorization": "another"}
    with contextlib.ExitStack() as open_ones:
        for headers in (mine, others, {}, {}):
            lines = open_ones.enter_context(client.stream("GET", url, headers=headers)).iter_lines()
            open_ones.callback(lines.close)  # type: ignore[attr-defined]  # kept: a stream closes with its iterator
            next(lines)
        refused = client.get(url, headers=mine)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "1 of your calls watch jobs" in refused.text


def test_a_quiet_job_is_still_heard_of(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_calls, "PATIENCE_S", 0.0)
    job = accept(client, prompt="never")["id"]
    with client.stream("GET", f"/jobs/{job}/events") as stream:
        assert any(line == ": nothing new" for line in stream.iter_lines())


def test_openais_client_remixes_a_video(client: httpx.Client, jobs_backend: FakeBackend) -> None:
    theirs = openai.OpenAI(base_url=str(client.base_url), api_key="none")
    extra = {"seed": 7, "fps": 8, "num_inference_steps": 3, "priority": "batch", "deadline_s": 100}
    first = theirs.videos.create(prompt="a cup", model="film", size="64x48", extra_body=extra)
    other = theirs.videos.remix(first.id, prompt="a jug")
    assert (other.remixed_from_video_id, other.prompt, other.size) == (first.id, "a jug", "64x48")
    assert theirs.videos.poll(other.id).status == "completed"
    theirs.videos.poll(first.id)
    found = [client.get(f"/jobs/{each}").json() for each in (first.id, other.id)]
    same = [{key: value for key, value in each["request"].items() if key != "prompt"} for each in found]
    assert same[0] == same[1]
    assert [each["priority"] for each in found] == ["batch", "batch"]
    assert found[1]["deadline_at"] is None
    for job_id, body, status in (
        (UNKNOWN, {"prompt": "a"}, 404),
        (first.id, {"prompt": " "}, 400),
        (first.id, {}, 400),
    ):
        assert client.post(f"/videos/{job_id}/remix", json=body).status_code == status
    refused = client.post(f"/videos/{first.id}/remix", json={"prompt": "a", "seed": 8})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "seed")
    picture = accept(client)["id"]
    assert client.post(f"/videos/{picture}/remix", json={"prompt": "a"}).status_code == 404
    jobs_backend._models = jobs_backend._models[:1]
    gone = client.post(f"/videos/{first.id}/remix", json={"prompt": "a"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_a_video_is_remixed_by_its_model_under_a_new_name(client: httpx.Client, jobs_backend: FakeBackend) -> None:
    """The old one is an alias now, and runners know real names only."""
    first = client.post("/videos", json={"model": "film", "prompt": "a cup"}).json()["id"]
    until(client, first, "succeeded")
    (film,) = [each for each in jobs_backend._models if each.name == "film"]
    renamed = film.model_copy(update={"name": "film-2", "aliases": ("film",)})
    jobs_backend._models = [each for each in jobs_backend._models if each.name != "film"] + [renamed]
    jobs_backend.found["film-2"] = jobs_backend.found["film"]
    other = client.post(f"/videos/{first}/remix", json={"prompt": "a jug"}).json()
    assert other["model"] == "film-2"
    until(client, other["id"], "succeeded")


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"limits": Limits(max_width=48)}, "size", "invalid_size"),
        ({"limits": Limits(size_multiple=128)}, "size", "invalid_size"),
        ({"limits": Limits(max_num_frames=4)}, "num_frames", "invalid_value"),
        ({"limits": Limits(max_num_inference_steps=3)}, "num_inference_steps", "invalid_value"),
        ({"limits": Limits(max_work=64 * 64 * 5 * 4 - 1)}, None, "too_much_work"),
        ({"tasks": ("image-to-video",)}, "model", "wrong_task"),
        ({"loras": ()}, "loras", "invalid_value"),
    ],
)
def test_a_remix_keeps_to_what_its_model_allows_now(
    client: httpx.Client, jobs_backend: FakeBackend, changes: dict[str, Any], param: str | None, code: str
) -> None:
    body = {"model": "film", "prompt": "a cup", "size": "64x64", "num_frames": 5, "loras": [{"name": "ink"}]}
    first = client.post("/videos", json=body).json()["id"]
    until(client, first, "succeeded")
    (film,) = [each for each in jobs_backend._models if each.name == "film"]
    jobs_backend._models = [film.model_copy(update=changes)]
    new, remix = client.post("/videos", json=body), client.post(f"/videos/{first}/remix", json={"prompt": "a jug"})
    assert (new.status_code, remix.status_code) == (400, 400)
    told = remix.json()["error"]
    assert (told["param"], told["code"]) == (param, code)
    assert new.json()["error"] | {"message": told["message"]} == told
    assert new.json()["error"]["message"] in told["message"] and first in told["message"]
    assert len(client.get("/jobs").json()["data"]) == 1


def test_a_job_belongs_to_the_trace_of_its_call(jobs_backend: FakeBackend, client: httpx.Client) -> None:
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for sent, kept in ((given, given), ("nonsense", ""), (None, "")):
        headers = ASYNC | ({"traceparent": sent} if sent else {})
        job = client.post("/images/generations", json=BODY, headers=headers).json()
        assert "traceparent" not in job["request"]
        until(client, job["id"], "succeeded")
        assert jobs_backend.requests[-1].traceparent == kept
