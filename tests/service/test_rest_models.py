"""REST and its models, without Ray: names, tasks, limits, states, keys, and streams that wait or are left."""

import asyncio
import base64
import json
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect

from service.api.rest import rest_app
from service.state.model_states import STATES, ModelState
from tests.support.backend import FakeBackend
from tests.support.hostile import colored, file

IMAGES, VIDEOS, EDITS = "/v1/images/generations", "/v1/videos/sync", "/v1/images/edits"


def error_of(answer: Any) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


@pytest.mark.parametrize(
    ("path", "asked", "name"),
    [(IMAGES, "brush", "paint"), (IMAGES, "pencil", "paint"), (IMAGES, "paint", "paint"), (VIDEOS, "movie", "film")],
)
def test_a_model_answers_to_its_aliases(
    client: TestClient, backend: FakeBackend, path: str, asked: str, name: str
) -> None:
    assert client.post(path, json={"model": asked, "prompt": "a"}).status_code == 200
    assert backend.requests[0].model == name
    assert client.get(f"/v1/models/{asked}").json()["id"] == name


@pytest.mark.parametrize(
    ("path", "model", "instead"), [(IMAGES, "film", VIDEOS), (IMAGES, "movie", VIDEOS), (VIDEOS, "paint", IMAGES)]
)
def test_a_model_is_asked_only_for_what_it_is_for(
    client: TestClient, backend: FakeBackend, path: str, model: str, instead: str
) -> None:
    answer = client.post(path, json={"model": model, "prompt": "a"})
    assert error_of(answer) == (400, "model", "wrong_task")
    assert instead in answer.json()["error"]["message"]
    assert backend.requests == []


@pytest.mark.parametrize("path", [IMAGES, VIDEOS])
def test_a_model_whose_tasks_are_unknown_may_be_asked_for_all(client: TestClient, path: str) -> None:
    assert client.post(path, json={"model": "one", "prompt": "a"}).status_code == 200


def test_a_video_is_the_file_itself(client: TestClient, backend: FakeBackend) -> None:
    body = {"model": "film", "prompt": "a", "seed": 5, "fps": 8, "guidance_scale_2": 2.5, "user": "me"}
    answer = client.post(VIDEOS, json=body)
    assert (answer.status_code, answer.content) == (200, b"picture 5")
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["x-seed"] == "5"
    assert answer.headers["x-ignored-params"] == "user"
    assert json.loads(answer.headers["x-metrics"])["step_seconds"] == [0.5]
    assert "x-warnings" not in answer.headers
    (request,) = backend.requests
    assert (request.width, request.height, request.num_frames, request.num_inference_steps) == (64, 64, 5, 4)
    assert (request.fps, request.guidance_scale_2, request.output_format, request.n) == (8, 2.5, "mp4", 1)


def test_a_prompt_that_is_cut_is_reported(client: TestClient) -> None:
    said = "prompt: text_encoder reads 512 of 719 tokens"
    picture = client.post(IMAGES, json={"model": "one", "prompt": "long"})
    assert (picture.headers["x-warnings"], picture.json()["warnings"]) == (said, [said])
    assert client.post(VIDEOS, json={"model": "film", "prompt": "long"}).headers["x-warnings"] == said
    streamed = client.post(IMAGES, json={"model": "one", "prompt": "long", "stream": True}).text
    assert f'"warnings": ["{said}"]' in streamed
    assert client.post(IMAGES, json={"model": "one", "prompt": "a"}).json()["warnings"] == []


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"num_frames": 10}, "num_frames", "invalid_value"),
        ({"num_frames": 0}, "num_frames", "invalid_value"),
        ({"num_frames": 2.5}, "num_frames", "invalid_value"),
        ({"fps": 121}, "fps", "invalid_value"),
        ({"guidance_scale_2": -1}, "guidance_scale_2", "invalid_value"),
        ({"n": 2}, "n", "invalid_value"),
        ({"seeds": [1]}, "seeds", "unknown_parameter"),
        ({"output_format": "mp4"}, "output_format", "unknown_parameter"),
        ({"num_frames": 9, "num_inference_steps": 11}, None, "too_much_work"),
        ({"size": "128x128", "num_inference_steps": 5}, None, "too_much_work"),
    ],
    ids=str,
)
def test_videos_that_are_refused(
    client: TestClient, backend: FakeBackend, body: dict[str, Any], param: str | None, code: str
) -> None:
    answer = client.post(VIDEOS, json={"model": "film", "prompt": "a"} | body)
    assert error_of(answer) == (400, param, code)
    assert backend.requests == []


def test_work_is_refused_above_its_limit_and_not_at_it(client: TestClient) -> None:
    most = {"model": "film", "prompt": "a", "num_frames": 9, "num_inference_steps": 10}
    assert client.post(VIDEOS, json=most).status_code == 200
    answer = client.post(VIDEOS, json=most | {"num_inference_steps": 11})
    assert f"is {64 * 64 * 9 * 11}, at most {64 * 64 * 9 * 10} is allowed" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("n", "status"), [(2, 200), (3, 400)])
def test_every_picture_of_a_request_is_work(client: TestClient, n: int, status: int) -> None:
    assert client.post(IMAGES, json={"model": "paint", "prompt": "a", "n": n}).status_code == status


def test_models_are_listed_with_their_state_and_the_reason(client: TestClient, backend: FakeBackend) -> None:
    backend.found["two"] = ModelState("waiting", "needs 4 GPUs on one node, the largest node has 2")
    del backend.found["film"]  # added a moment ago; nobody has looked yet
    listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert {name: (model["state"], model["reason"]) for name, model in listed.items()} == {
        "one": ("running", ""),
        "two": ("waiting", "needs 4 GPUs on one node, the largest node has 2"),
        "paint": ("running", ""),
        "film": ("starting", ""),
    }
    assert listed["film"]["tasks"] == ["text-to-video"]
    assert listed["paint"]["aliases"] == ["brush", "pencil"]
    assert client.get("/v1/models/two").json() == listed["two"]


def test_the_cluster_is_the_backends_own_account(client: TestClient) -> None:
    assert client.get("/v1/cluster").json() == {"object": "cluster", "mark": "of the backend"}


PROTECTED = [
    ("POST", "/v1/profiles"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/one"),
    ("GET", "/v1/cluster"),
    ("POST", IMAGES),
    ("POST", EDITS),
    ("POST", VIDEOS),
    ("GET", "/v1/requests"),
    ("GET", "/v1/requests/{id}"),
    ("DELETE", "/v1/requests/{id}"),
    ("GET", "/v1/videos"),
    ("POST", "/v1/videos"),
    ("GET", "/v1/videos/{video_id}"),
    ("DELETE", "/v1/videos/{video_id}"),
    ("GET", "/v1/videos/{video_id}/content"),
    ("POST", "/v1/videos/{video_id}/cancel"),
    ("POST", "/v1/videos/{video_id}/remix"),
    ("GET", "/v1/videos/{video_id}/events"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/{job_id}"),
    ("DELETE", "/v1/jobs/{job_id}"),
    ("GET", "/v1/jobs/{job_id}/content"),
    ("GET", "/v1/jobs/{job_id}/events"),
    ("POST", "/v1/jobs/{job_id}/cancel"),
]

KEYLESS = {"/livez", "/readyz", "/health", "/docs", "/openapi.json", "/v1/outputs/{name}"}
"""Probes, the description, and what needs a signed URL instead."""


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_callers_need_a_key_if_the_deployment_has_keys(
    client: TestClient, backend: FakeBackend, method: str, path: str
) -> None:
    backend.key = "sesame"
    body = {"model": "one", "prompt": "a"} if method == "POST" else None
    if body and path.endswith("/remix"):
        del body["model"]  # that of the video
    if body and path == EDITS:
        body["image"] = f"data:image/png;base64,{base64.b64encode(file(colored())).decode()}"
    for headers in ({}, {"authorization": "Bearer other"}):
        answer = client.request(method, path, json=body, headers=headers)
        assert error_of(answer) == (401, None, "invalid_api_key")
        assert answer.headers["x-should-retry"] == "false"
    assert client.request(method, path, content=b"{").status_code == 401  # before anything is said of the body
    assert backend.requests == []
    if path.endswith("/profiles"):  # it says which model in its query
        path += "?model=one"
    answer = client.request(method, path, json=body, headers={"authorization": "Bearer sesame"})
    assert answer.status_code == (404 if "id}" in path else 200)
    for probe in ("/livez", "/readyz"):
        assert client.get(probe).status_code == 200


def test_every_route_of_v1_needs_a_key(backend: FakeBackend) -> None:
    """Also one that is added later: access belongs to the router, not to the routes."""
    backend.key = "sesame"
    app = rest_app(backend)
    client = TestClient(app)
    routes = iter_route_contexts(app.routes)
    found = [(method, str(route.path)) for route in routes for method in route.methods or ()]
    callers = {(method, path.replace("{name:path}", "one")) for method, path in found if path not in KEYLESS}
    assert callers == set(PROTECTED)
    assert {path for _, path in found} - {
        path for _, path in found if path.startswith("/v1") and path not in KEYLESS
    } == KEYLESS
    for method, path in callers:
        assert error_of(client.request(method, path)) == (401, None, "invalid_api_key")


@pytest.mark.parametrize(
    ("states", "status", "waiting"),
    [
        ({"one": "running", "two": "running"}, 200, []),
        ({"one": "running", "two": "failed"}, 200, ["two"]),
        ({"one": "asleep", "two": "waiting"}, 200, ["two"]),
        ({"one": "asleep", "two": "asleep"}, 200, []),
        ({"one": "starting", "two": "failed"}, 503, ["one", "two"]),
        ({}, 503, []),
    ],
)
def test_ready_as_long_as_one_model_answers(
    client: TestClient, backend: FakeBackend, states: dict[str, Any], status: int, waiting: list[str]
) -> None:
    backend.found = {name: ModelState(state) for name, state in states.items()}
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["waiting_for"]) == (status, waiting)
    assert answer.json()["status"] == ("ok" if status == 200 else "waiting")
    assert answer.json()["instance_id"] == "test"


def test_a_draining_gateway_is_taken_off_the_network(client: TestClient, backend: FakeBackend) -> None:
    backend.draining, backend.in_flight = True, 2
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"], answer.json()["in_flight"]) == (503, "draining", 2)
    assert client.get("/livez").status_code == 200  # or it would be killed with what it still computes


@pytest.mark.parametrize("state", STATES)
def test_a_stream_says_what_it_waits_for(backend: FakeBackend, client: TestClient, state: Any) -> None:
    backend.found["paint"] = ModelState(state, queued=3)
    body = {"model": "brush", "prompt": "asleep", "stream": True}
    lines = [line for line in client.post(IMAGES, json=body).text.splitlines() if line]
    assert lines[:3] == [f": paint is {state}, 3 wait, this is number 2, in about 7 s"] * 3
    assert lines[3] == ": step 1/1"
    assert lines[-1] == "data: [DONE]"
    assert client.post(IMAGES, json=body | {"stream": False}).status_code == 200


def test_a_deadline_comes_as_a_header(backend: FakeBackend, client: TestClient) -> None:
    body, before = {"model": "one", "prompt": "a"}, time.time()
    assert client.post(IMAGES, json=body, headers={"x-request-timeout-seconds": "60.5"}).status_code == 200
    at = backend.requests[-1].deadline_at
    assert at is not None and before + 60.5 <= at <= time.time() + 60.5
    assert client.post(IMAGES, json=body).status_code == 200
    assert backend.requests[-1].deadline_at is None
    for wrong in ("0", "-1", "soon", "nan", "inf", "1e9"):
        answer = client.post(IMAGES, json=body, headers={"x-request-timeout-seconds": wrong})
        assert answer.status_code == 400, wrong
        assert answer.json()["error"]["param"] == "x-request-timeout-seconds"


def test_a_stream_that_is_quick_says_nothing_of_states(client: TestClient) -> None:
    assert " wait" not in client.post(IMAGES, json={"model": "one", "prompt": "a", "stream": True}).text


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])  # servers tell of a client who left in two ways
@pytest.mark.parametrize("prompt", ["never", "endless"])
def test_a_client_who_leaves_ends_the_work(backend: FakeBackend, prompt: str, spec_version: str) -> None:
    assert asyncio.run(_left_early(backend, prompt, spec_version))


async def _left_early(backend: FakeBackend, prompt: str, spec_version: str) -> bool:
    """True if the backend's generator was closed before it came to its end."""
    body = json.dumps({"model": "one", "prompt": prompt, "stream": True}).encode()
    came, sent = asyncio.Event(), 0

    async def receive() -> MutableMapping[str, Any]:
        if not came.is_set():
            came.set()
            return {"type": "http.request", "body": body, "more_body": False}
        while sent < 3:
            await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal sent
        sent += message["type"] == "http.response.body"
        if sent >= 3 and spec_version == "2.4":
            raise OSError("the client is gone")

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": spec_version}, "http_version": "1.1",
        "method": "POST", "path": IMAGES, "raw_path": IMAGES.encode(), "root_path": "", "query_string": b"",
        "scheme": "http", "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    assert not backend.closed
    with suppress(ClientDisconnect):  # what the app says to a server whose client is gone
        await rest_app(backend)(scope, receive, send)  # in this task: when it returns, the work has ended
    assert sent >= 3
    return backend.closed


def test_a_stream_says_when_its_request_starts_again(client: TestClient) -> None:
    body = {"model": "one", "prompt": "again", "stream": True}
    lines = client.post("/v1/images/generations", json=body).text.splitlines()
    assert [line for line in lines if line.startswith(":")] == [
        ": step 1/1",
        ": lost its ranks and starts again, attempt 2",
        ": step 1/1",
    ]
