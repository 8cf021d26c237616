"""Health over gRPC: one answer, a list, a watch, and how a watch ends."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc import health, methods
from service.state.model_states import ModelState
from tests.support.grpc_calls import OK, Backend, ask, finished, served


def test_health() -> None:
    backend = Backend()
    backend.found |= {"two": ModelState("failed", "x"), "paint": ModelState("asleep")}

    def status(service: str) -> int:
        return int(ask(backend, "Check", health_pb2.HealthCheckRequest(service=service)).messages[0].status)

    assert [status(name) for name in ("", health.SERVER[1], "one", "two", "paint")] == [1, 1, 1, 2, 1]
    answer = ask(backend, "Check", health_pb2.HealthCheckRequest(service="nope"))
    assert answer.code == grpc.StatusCode.NOT_FOUND
    statuses_ = ask(backend, "List", health_pb2.HealthListRequest()).messages[0].statuses
    assert {name: each.status for name, each in statuses_.items()} == {
        "": 1, "one": 1, "two": 2, "paint": 1, "film": 1,
    }  # fmt: skip
    backend.draining = True
    assert [status(name) for name in ("", "one")] == [2, 2]


def test_health_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.01)
    monkeypatch.setattr("service.rpc.methods.MOST_WATCHERS", 2)
    backend = Backend()

    async def story() -> None:
        async with served(backend) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            one = stub.Watch(health_pb2.HealthCheckRequest(service="one"))
            none = stub.Watch(health_pb2.HealthCheckRequest(service="nope"))
            assert [(await each.read()).status for each in (one, none)] == [1, 3]
            backend.found["one"] = ModelState("failed")
            assert (await one.read()).status == 2
            refused = await finished(stub.Watch(health_pb2.HealthCheckRequest()))
            assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            one.cancel()
            while len(methods._watchers) == 2:
                await asyncio.sleep(0.01)
            assert (await stub.Watch(health_pb2.HealthCheckRequest()).read()).status == 1

    asyncio.run(asyncio.wait_for(story(), 60))


class Call:
    """The context of a call, from an address."""

    def __init__(self, address: str) -> None:
        self.address, self.code = address, OK

    def peer(self) -> str:
        return self.address

    def invocation_metadata(self) -> Any:
        return ()

    trailing_metadata = invocation_metadata

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        pass

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        pass


def test_an_address_watches_up_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.rpc.methods.MOST_OF_ONE", 1)
    backend = Backend()

    async def story() -> None:
        codes, watches = [], []
        for address in ("ipv4:10.0.0.1:1", "ipv4:10.0.0.1:2", "ipv4:10.0.0.2:1", "ipv6:%5Bfd00::1%5D:1"):
            watches.append(backend.Watch(health_pb2.HealthCheckRequest(), call := Call(address)))
            await anext(watches[-1])
            codes.append(call.code)
        assert codes == [OK, grpc.StatusCode.RESOURCE_EXHAUSTED, OK, OK]
        for watch in watches:
            await watch.aclose()
        assert len(methods._watchers) == 0

    asyncio.run(asyncio.wait_for(story(), 60))


@pytest.mark.parametrize(("service", "told"), [("", [1, 2]), ("one", [1, 2]), ("two", [2]), ("nope", [3])])
def test_watching_ends_when_the_gateway_drains(monkeypatch: pytest.MonkeyPatch, service: str, told: list[int]) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.01)
    backend = Backend()
    backend.found["two"] = ModelState("failed")

    async def story() -> None:
        async with served(backend) as channel:
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
            heard = []
            async for message in watching:
                heard.append(message.status)
                backend.draining = True
            assert (await watching.code(), heard) == (OK, told)
            assert len(methods._watchers) == 0

    asyncio.run(asyncio.wait_for(story(), 60))


def test_watching_has_a_longest_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.01)
    monkeypatch.setattr(health, "LONGEST_S", 0.2)
    backend = Backend()
    answer = ask(backend, "Watch", health_pb2.HealthCheckRequest())
    assert (answer.code, [message.status for message in answer.messages]) == (OK, [1])
    assert len(methods._watchers) == 0
