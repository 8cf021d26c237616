"""What waits and runs is listed and canceled, by REST, the command line and between gateways."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import httpx
import pytest

from service.api.rest import rest_app
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.state import exchange, live_requests, router_registry
from service.state.exchange import OTHERS, Colleagues, Exchange, Question
from service.state.live_requests import LiveRequests
from service.state.tickets import Prospect
from tests.support.backend import FakeBackend
from tests.support.grpc_calls import Backend, params, served
from workers.errors import RequestCancelled
from workers.messages import GenerationRequest, StepEvent

REQUEST = GenerationRequest("mine-0123abcd", "one", "a cup", 64, 64, 4, seed=1)
IMAGES = "/v1/images/generations"


async def steps(*numbers: int) -> AsyncGenerator[StepEvent]:
    for number in numbers:
        yield StepEvent(number, 4, 0.1)
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def client_of(backend: FakeBackend) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(rest_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        yield client


async def until(call: Any, wanted: Any) -> Any:
    async with asyncio.timeout(60):
        while not wanted(seen := await call()):
            await asyncio.sleep(0.01)
    return seen


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 120))


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_is_canceled_from_elsewhere(streams: bool) -> None:
    backend = FakeBackend()

    async def story() -> None:
        async with client_of(backend) as client:
            assert (await client.get("/v1/requests")).json() == {"object": "list", "data": [], "silent_gateways": []}
            body = {"model": "one", "prompt": "never" if streams else "slow", "stream": streams}
            asked = asyncio.create_task(client.post(IMAGES, json=body, headers={"x-request-id": "mine"}))

            async def listed() -> Any:
                return (await client.get("/v1/requests")).json()["data"]

            (one,) = await until(listed, bool)
            assert one["id"].startswith("mine-") and one["object"] == "request"
            assert (one["model"], one["state"], one["key"], one["total_steps"]) == ("one", "queued", None, 50)
            assert (await client.get(f"/v1/requests/{one['id']}")).json() == one
            assert (await client.get("/v1/requests/mine")).json() == one
            assert (await client.get("/v1/requests/min")).json()["error"]["code"] == "request_not_found"
            gone = await client.request("DELETE", "/v1/requests/mine", headers={"content-type": "application/json"})
            assert gone.json() == {"id": one["id"], "object": "request.canceled", "canceled": True}
            answer = await asked
            error = {"message": "the request was canceled by another call", "type": "invalid_request_error",
                     "param": None, "code": "cancelled"}  # fmt: skip
            if streams:
                assert answer.status_code == 200
                assert json.loads(answer.text.split("\n\n")[-2].removeprefix("data: ")) == {"error": error}
                assert "[DONE]" not in answer.text
            else:
                assert (answer.status_code, answer.json()) == (499, {"error": error})
                assert answer.headers["x-should-retry"] == "false"
            assert backend.closed
            assert await listed() == []
            assert (await client.delete("/v1/requests/mine")).status_code == 404

    run(story())


def test_an_id_that_several_requests_came_with_is_no_name() -> None:
    backend = FakeBackend()

    async def story() -> None:
        async with client_of(backend) as client:
            body = {"model": "one", "prompt": "slow"}
            asked = [asyncio.create_task(client.post(IMAGES, json=body, headers={"x-request-id": "a"})) for _ in "ab"]
            await until(lambda: backend.live.told(None), lambda told: len(told) == 2)
            refused = await client.delete("/v1/requests/a")
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "id")
            backend.released.set()
            assert [(await each).status_code for each in asked] == [200, 200]

    run(story())


def test_a_canceled_call_of_grpc_has_its_status() -> None:
    backend = Backend()

    async def story() -> None:
        async with served(backend) as channel:
            stub = services.MediaGenerationServiceStub(channel)
            call = stub.GenerateImage(pb.GenerateImageRequest(params=params(prompt="slow"), request_id="mine"))
            (one,) = await until(lambda: backend.live.told(None), bool)
            assert await backend.cancel(one["id"])
            assert (await call.code()).name == "CANCELLED"

    run(story())


def test_each_request_of_an_elastic_gang_has_its_own_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backlog is that of all; `request_id` names the latest alone."""
    both = [
        {"request_id": REQUEST.request_id, "ranks": [0], "step": 3, "total_steps": 5, "eta_s": 7.0},
        {"request_id": "other", "ranks": [1], "step": 1, "total_steps": 9, "eta_s": 90.0},
    ]
    now = {"request_id": "other", "step": 1, "total_steps": 9, "requests": both}
    report = {"now": now, "backlog_s": 50.0, "reported_at": time.time() + 1e6, "request_s": 2.0}
    monkeypatch.setattr(router_registry, "lookup", lambda application: (0, [report]))

    async def story() -> None:
        live = LiveRequests("g")
        watched = live.watched(REQUEST, "web", steps(1, 2))
        await anext(watched)
        live.begun(REQUEST.request_id)
        (one,) = await live.told(None)
        assert (one["step"], one["total_steps"]) == (3, 5)
        assert one["eta_seconds"] == pytest.approx(1e6 + 7.0, abs=2.0)
        both[0]["eta_s"] = None  # nobody knows what a step takes
        assert (await live.told(None))[0]["eta_seconds"] is None

    run(story())


def test_the_state_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [
        {"now": {"request_id": "other", "step": 3, "total_steps": 4}, "backlog_s": 9.0, "reported_at": 0.0,
         "request_s": 2.0},
    ]  # fmt: skip

    async def standing(application: str, request_id: str) -> Prospect | None:
        assert application == "model-one"
        return Prospect(2, 5.0)

    monkeypatch.setattr(router_registry, "lookup", lambda application: (0, reports))
    monkeypatch.setattr(router_registry, "standing", standing)

    async def story() -> None:
        live = LiveRequests("g")
        watched = live.watched(REQUEST, "web", steps(1, 2))
        await anext(watched)
        (one,) = await live.told("web")
        assert (one["state"], one["position"], one["eta_seconds"], one["step"]) == ("queued", 3, 7.0, 1)
        assert (one["key"], one["gateway"]) == ("web", "g")
        live.begun(REQUEST.request_id)
        await anext(watched)
        (one,) = await live.told(None)
        assert (one["state"], one["position"], one["eta_seconds"], one["step"]) == ("running", None, None, 2)
        now = {"request_id": REQUEST.request_id, "step": 3, "total_steps": 5}
        reports.append({"now": now, "backlog_s": 4.0, "reported_at": one["since"] + 1e6, "request_s": 2.0})
        (one,) = await live.told(None)
        assert (one["step"], one["total_steps"]) == (3, 5)
        assert one["eta_seconds"] >= 4.0
        live.lost(REQUEST.request_id)
        (one,) = await live.told(None)
        assert (one["state"], one["position"], one["step"]) == ("queued", 3, 0)

        async def hanging(*_: str) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(router_registry, "standing", hanging)
        monkeypatch.setattr(live_requests, "PLACE_S", 0.01)
        assert (await live.told(None))[0]["position"] is None
        assert await live.told("another") == []
        assert not live.cancel(REQUEST.request_id, "another")
        assert live.cancel(REQUEST.request_id, "web")
        with pytest.raises(RequestCancelled):
            await anext(watched)
        assert await live.told(None) == []

    run(story())


class Handle:
    """An actor's handle, for an object of this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)

        class Call:
            remote = staticmethod(lambda *args: asyncio.ensure_future(method(*args)))

        return Call()


def test_gateways_ask_each_other_and_name_who_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "ANSWERS_S", 2.0)  # a busy machine may stand still for a second
    monkeypatch.setattr(exchange, "POLL_S", 0.2)
    monkeypatch.setattr(exchange, "AGAIN_S", 0.01)

    async def story() -> None:
        keeper = Exchange()
        stopped = asyncio.Event()

        def gateway(name: str) -> Colleagues:
            async def answer(question: Question) -> Any:
                if name == "c" and stopped.is_set():
                    await asyncio.Event().wait()
                return name, question

            return Colleagues(name, answer, lambda: Handle(keeper))

        a, b, c = gateways = [gateway(name) for name in "abc"]
        question = ("told", (None,))
        assert await a.ask(question) == ([("a", question)], [])  # it is alone
        a._several = True
        assert await a.ask(question) == ([("a", question)], [OTHERS])
        for each in gateways:
            each.follow(True)
        await until(lambda: a.ask(question), lambda found: found == ([(n, question) for n in "abc"], []))
        await asyncio.sleep(0.5)  # calls are opened again
        assert await b.ask(question) == ([(n, question) for n in "bac"], [])
        stopped.set()
        assert await a.ask(question) == ([("a", question), ("b", question)], ["c"])
        assert c._attending is not None
        c._attending.cancel()
        monkeypatch.setattr(exchange, "FORGOTTEN_S", 0.5)
        await until(lambda: a.ask(question), lambda found: found == ([("a", question), ("b", question)], []))
        for each in gateways:
            each.follow(False)

    run(story())
