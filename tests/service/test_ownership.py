"""Two keys and an operator's walk every route and every RPC: each sees, cancels and downloads what it made, no more."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from fastapi.routing import iter_route_contexts
from ray.serve.schema import ServeStatus

from deploy.api_keys import digest
from service.api.backend import Report
from service.api.rest import rest_app
from service.gateway import Gateway
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.state.exchange import Exchange
from sp_core.degrees import ParallelDegrees
from tests.service.test_gateway import TABLE
from tests.service.test_requests import Handle, until
from tests.support.backend import a_model
from tests.support.grpc_calls import finished, methods, served
from workers.messages import GenerationRequest, GenerationResult, StepEvent

IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos/sync"
BODY = {"model": "one", "prompt": "a cup", "size": "64x64"}
ALICE, BOB, ROOT = ({"authorization": f"Bearer {name}"} for name in ("alice", "bob", "root"))

OPEN = {"GET /livez", "GET /readyz", "GET /health", "GET /docs", "GET /openapi.json"}
"""They tell nothing of anybody's requests, and need no key."""

EVERYBODYS = {"GET /v1/models", "GET /v1/models/{name:path}"}
"""The same for each key."""

ADMINS = {"GET /v1/cluster", "POST /v1/profiles"}

OWN = {"GET /v1/requests", "GET /v1/requests/{id}", "DELETE /v1/requests/{id}"}
"""What a key has made, and no other."""

BY_SIGNATURE = {"GET /v1/outputs/{name}", "HEAD /v1/outputs/{name}"}
"""Whoever has the URL, which nobody guesses, and no other."""

JOBS = {
    "GET /v1/videos",
    "GET /v1/videos/{video_id}",
    "DELETE /v1/videos/{video_id}",
    "GET /v1/videos/{video_id}/content",
    "POST /v1/videos/{video_id}/cancel",
    "POST /v1/videos/{video_id}/remix",
    "GET /v1/videos/{video_id}/events",
    "GET /v1/jobs",
    "GET /v1/jobs/{job_id}",
    "DELETE /v1/jobs/{job_id}",
    "GET /v1/jobs/{job_id}/content",
    "GET /v1/jobs/{job_id}/events",
    "POST /v1/jobs/{job_id}/cancel",
}
"""What a key has made, and no other, not even an operator's."""

CREATES = {f"POST {IMAGES}", f"POST {VIDEOS}", "POST /v1/videos", "POST /v1/images/edits"}

JOB_RPCS = {"GetJob", "ListJobs", "WatchJob", "CancelJob", "DeleteJob", "DownloadOutput"}
"""The same over gRPC."""

RPCS = {"GenerateImage", "GenerateStream", "ListModels", "CreateJob"}


class Drawing(Gateway):
    """A gateway whose requests take one step, and then as long as a test wants."""

    def __init__(self, instance_id: str) -> None:
        super().__init__(instance_id)
        self._dispatcher.run = self._draw  # type: ignore[method-assign]

    def cluster(self) -> dict[str, Any]:
        return {"object": "cluster"}

    async def _draw(self, request: GenerationRequest, *_: Any) -> AsyncGenerator[Report]:
        yield StepEvent(1, 50, 0.1)
        while request.prompt == "slow":
            await asyncio.sleep(0.01)
            yield StepEvent(1, 50, 0.1)
        yield GenerationResult((f"{request.seed}".encode(),), (request.seed,), ParallelDegrees(), 0.1, (0.1,), 0.1)


@pytest.fixture
def gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Gateway]:
    """Two gateways that see no cluster, but each other; not yet configured."""
    monkeypatch.setattr("service.state.poller._read", lambda: (ServeStatus(), [], [], {}))
    keys = [{"name": name, "sha256": digest(name)} for name in ("alice", "bob")]
    keys.append({"name": "operator", "sha256": digest("root"), "scope": "admin"})
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    return [Drawing("a"), Drawing("b")]


@contextlib.asynccontextmanager
async def opened(gates: list[Gateway], keys: Path) -> AsyncGenerator[list[httpx.AsyncClient]]:
    keeper = Exchange()
    models = [a_model("one").model_dump(mode="json")]
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for number, gate in enumerate(gates):
            await gate.reconfigure(TABLE | {"models": models, "api_keys_file": str(keys)})
            gate._colleagues._gateway = str(number)
            gate._colleagues._find_keeper = lambda: Handle(keeper)
            gate._colleagues.follow(True)
            transport = httpx.ASGITransport(rest_app(gate))
            clients.append(
                await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://here"))
            )
        await until(lambda: asyncio.sleep(0, [len(keeper._seats)]), lambda seats: seats == [2])
        yield clients
        for gate in gates:
            gate._colleagues.follow(False)


def test_the_walk_has_every_route_and_every_rpc() -> None:
    """A new one must be put into its set, and walked below."""
    routes = iter_route_contexts(rest_app(None).routes)  # type: ignore[arg-type]
    found = {f"{method} {route.path}" for route in routes for method in route.methods or ()}
    assert found == OPEN | EVERYBODYS | ADMINS | OWN | BY_SIGNATURE | JOBS | CREATES
    assert {name for name, _ in methods(pb.DESCRIPTOR)} == RPCS | JOB_RPCS


def test_each_key_sees_cancels_and_downloads_its_own(gates: list[Gateway], tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(gates, tmp_path / "keys.yaml") as (one, two):
            alices = asyncio.create_task(one.post(IMAGES, json=BODY | {"prompt": "slow"}, headers=ALICE))
            bobs = asyncio.create_task(two.post(IMAGES, json=BODY | {"prompt": "slow"}, headers=BOB))
            listed = await until(
                lambda: two.get("/v1/requests", headers=ROOT), lambda answer: len(answer.json()["data"]) == 2
            )
            owners = {each["key"]: each["id"] for each in listed.json()["data"]}
            assert set(owners) == {"alice", "bob"}
            made = [  # whichever gateway is asked
                [await walk(client, owners, "alice", ALICE), await walk(client, owners, "bob", BOB)]
                for client in (one, two)
            ]
            assert made[0] == made[1]  # an idempotency key is known at both
            assert not set(made[0][0]) & set(made[0][1])  # and each caller has its own
            assert not alices.done() and not bobs.done()

            gone = await two.delete(f"/v1/requests/{owners['alice']}", headers=ALICE)  # one has it
            assert gone.status_code == 200
            assert (await alices).status_code == 499
            assert not bobs.done()
            assert (await one.delete(f"/v1/requests/{owners['bob']}", headers=ROOT)).status_code == 200
            assert (await bobs).status_code == 499

    asyncio.run(asyncio.wait_for(story(), 120))


def test_each_key_has_its_own_jobs(gates: list[Gateway], tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(gates, tmp_path / "keys.yaml") as (one, two):
            job = (await one.post("/v1/videos", json=BODY, headers=ALICE)).json()["id"]
            unknown = f"job_{'0' * 44}"
            for route in JOBS:
                method, path = route.split(" ")
                path = path.replace("{video_id}", "{job_id}")
                body = {"prompt": "a"} if path.endswith("/remix") else None
                assert (await two.request(method, path.replace("{job_id}", job), json=body)).status_code == 401
                answers = [
                    await two.request(method, path.replace("{job_id}", each), json=body, headers=BOB)
                    for each in (job, unknown)
                ]
                if "{job_id}" not in path:
                    assert answers[0].json()["data"] == []
                    continue
                assert [answer.status_code for answer in answers] == [404, 404]
                said = [answer.json()["error"]["message"] for answer in answers]
                assert said[0].replace(job, unknown) == said[1]  # it does not even learn that there is one
            done = await until(
                lambda: two.get(f"/v1/videos/{job}", headers=ALICE),
                lambda answer: answer.json()["status"] == "completed",
            )
            content = await one.get(f"/v1/videos/{job}/content", headers=ALICE)
            assert content.content == str(done.json()["seed"]).encode()
            for path in ("/v1/videos", "/v1/jobs"):
                listed = await two.get(path, headers=ROOT)
                assert [each["id"] for each in listed.json()["data"]] == [job]
            assert (await two.get(f"/v1/videos/{job}/content", headers=ROOT)).content == content.content
            assert (await two.delete(f"/v1/videos/{job}", headers=ROOT)).status_code == 200
            assert (await one.get(f"/v1/videos/{job}", headers=ALICE)).status_code == 404

    asyncio.run(asyncio.wait_for(story(), 120))


async def walk(client: httpx.AsyncClient, owners: dict[str, str], name: str, key: dict[str, str]) -> list[int]:
    """Everything that a key may ask while both have a request; no request ends by it."""
    (other,) = set(owners) - {name}
    for route in OPEN:
        answer = await client.request(*route.split(" "))
        assert not any(owner in answer.text for owner in owners.values())
    for route in EVERYBODYS:
        path = route.split(" ")[1].replace("{name:path}", "one")
        answer = await client.get(path, headers=key)
        assert answer.status_code == 200
        assert not any(owner in answer.text for owner in owners.values())
        assert (await client.get(path)).status_code == 401
    for route in ADMINS:
        refused = await client.request(*route.split(" "), headers=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_only")
        assert (await client.request(*route.split(" "))).status_code == 401
    assert (await client.get("/v1/cluster", headers=ROOT)).status_code == 200
    listed = (await client.get("/v1/requests", headers=key)).json()
    assert [each["id"] for each in listed["data"]] == [owners[name]]
    assert listed["silent_gateways"] == []
    assert (await client.get(f"/v1/requests/{owners[name]}", headers=key)).json()["key"] == name
    assert (await client.get(f"/v1/requests/{owners[name]}", headers=ROOT)).json()["key"] == name
    for route in OWN:
        method, path = route.split(" ")
        assert (await client.request(method, path.replace("{id}", owners[other]))).status_code == 401
        if "{id}" in path:
            refused = await client.request(method, path.replace("{id}", owners[other]), headers=key)
            unknown = await client.request(method, path.replace("{id}", "0" * 32), headers=key)
            assert refused.status_code == unknown.status_code == 404  # it does not even learn that there is one
            text = refused.json()["error"]["message"].replace(owners[other], "0" * 32)
            assert text == unknown.json()["error"]["message"]
            assert refused.json()["error"]["code"] == unknown.json()["error"]["code"] == "request_not_found"
    for route in CREATES:
        assert (await client.post(route.split(" ")[1], json=BODY)).status_code == 401
    return await download(client, key)


async def download(client: httpx.AsyncClient, key: dict[str, str]) -> list[int]:
    """What is made is fetched by its URL, by nobody without it. The seeds of what was made for two idempotency keys."""
    seeds = []
    for path in (IMAGES, VIDEOS):
        made = await client.post(
            path, json=BODY | {"response_format": "url"}, headers=key | {"idempotency-key": f"k{path}"}
        )
        picture = made.json()["data"][0]
        for method in ("GET", "HEAD"):
            assert (await client.request(method, picture["url"])).status_code == 200
            assert (await client.request(method, picture["url"] + "0", headers=key)).status_code == 403
            assert (await client.request(method, picture["url"].partition("?")[0], headers=ROOT)).status_code == 403
        again = await client.post(
            path, json=BODY | {"response_format": "url"}, headers=key | {"idempotency-key": f"k{path}"}
        )
        assert again.headers["idempotency-replayed"] == "true"
        assert again.json()["data"][0]["seed"] == picture["seed"]
        seeds.append(picture["seed"])
    return seeds


def test_each_key_has_its_own_calls_of_grpc(gates: list[Gateway], tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(gates, tmp_path / "keys.yaml") as (client, _), served(gates[0]) as channel:
            stub = services.MediaGenerationServiceStub(channel)
            params = pb.GenerationParams(model="one", prompt="slow", width=64, height=64)
            call = stub.GenerateStream(
                pb.GenerateStreamRequest(params=params), metadata=[("authorization", "Bearer alice")]
            )
            accepted = (await call.read()).accepted.job_id
            bob = [("x-api-key", "bob")]
            fast = pb.GenerationParams(model="one", prompt="a", width=64, height=64)
            created = pb.CreateJobRequest(params=fast)
            assert (await finished(stub.CreateJob(created))).code.name == "UNAUTHENTICATED"
            job = (await stub.CreateJob(created, metadata=[("x-api-key", "alice")])).job.id
            for name in JOB_RPCS:
                message = getattr(pb, f"{name}Request")()
                for field in {"id", "job_id"} & set(message.DESCRIPTOR.fields_by_name):
                    setattr(message, field, job)
                assert (await finished(getattr(stub, name)(message))).code.name == "UNAUTHENTICATED"
                answer = await finished(getattr(stub, name)(message, metadata=bob))
                if name == "ListJobs":
                    assert list(answer.messages[0].jobs) == []
                else:
                    assert (answer.code.name, answer.details["ErrorInfo"].reason) == ("NOT_FOUND", "job_not_found")
            for key in ("alice", "root"):
                listed = await stub.ListJobs(pb.ListJobsRequest(), metadata=[("x-api-key", key)])
                assert [each.id for each in listed.jobs] == [job]
            models = await finished(stub.ListModels(pb.ListModelsRequest(), metadata=bob))
            assert accepted not in str(models.messages[0])
            assert (await client.get(f"/v1/requests/{accepted}", headers=BOB)).status_code == 404
            assert (await client.delete(f"/v1/requests/{accepted}", headers=BOB)).status_code == 404
            seeds = []
            for key in ("alice", "bob", "alice"):
                metadata = [("authorization", f"Bearer {key}"), ("idempotency-key", "k")]
                answer = await finished(stub.GenerateImage(pb.GenerateImageRequest(params=fast), metadata=metadata))
                seeds.append(answer.messages[0].outputs[0].header.seed)
            assert seeds[0] == seeds[2] != seeds[1]
            assert (await client.delete(f"/v1/requests/{accepted}", headers=ALICE)).status_code == 200
            with pytest.raises(grpc.aio.AioRpcError, match="canceled by another call"):
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert (await call.code()).name == "CANCELLED"

    asyncio.run(asyncio.wait_for(story(), 120))


def test_without_keys_everybody_sees_everything(gates: list[Gateway]) -> None:
    gate = gates[0]

    async def story() -> None:
        await gate.reconfigure(TABLE | {"models": [a_model("one").model_dump(mode="json")]})
        transport = httpx.ASGITransport(rest_app(gate))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            asked = asyncio.create_task(client.post(IMAGES, json=BODY | {"prompt": "slow"}))
            answer: Any = await until(
                lambda: client.get("/v1/requests"), lambda seen: [each["step"] for each in seen.json()["data"]] == [1]
            )
            (one,) = answer.json()["data"]
            assert (one["key"], one["gateway"], one["step"]) == (None, "local", 1)
            assert (await client.delete(f"/v1/requests/{one['id']}")).status_code == 200
            assert (await asked).status_code == 499

    asyncio.run(asyncio.wait_for(story(), 120))
