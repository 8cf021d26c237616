"""The gateway itself, without Serve: who is let in, its table while it runs, and what it still takes when it drains."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from ray.serve.handle import DeploymentResponseGenerator
from ray.serve.schema import ServeStatus

from service import gateway
from service.gateway import Gateway
from service.state.model_states import ModelState
from sp_core.degrees import ParallelDegrees
from tests.support.backend import FakeBackend, a_model
from workers.errors import GangLost, ModelNotFound, ModelUnavailable, RequestFailed, ShuttingDown, Unauthorized
from workers.messages import GenerationRequest, GenerationResult, StepEvent

REQUEST = GenerationRequest("a", "one", "a cup", 64, 64, 4, seed=1)
METRICS = {"host": "127.0.0.1", "port": None}
TABLE = {
    "models": [],
    "draining": False,
    "max_body_bytes": 4096,
    "api_keys_env": None,
    "metrics": METRICS,
    "models_folder": None,
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """A gateway that sees no cluster."""
    monkeypatch.setattr("service.state.poller._read", lambda: (ServeStatus(), [], []))
    return Gateway("test")


@pytest.mark.parametrize("header", ["Bearer k1", "Bearer k2", "bearer k2"])
def test_each_of_several_keys_opens(opened: Gateway, monkeypatch: pytest.MonkeyPatch, header: str) -> None:
    asyncio.run(opened.reconfigure(TABLE))
    opened.admit(None)  # until keys are asked for
    monkeypatch.setenv("KEYS", "k1, k2,")
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    opened.admit(header)


@pytest.mark.parametrize("key", ["ключ", "voilà", "é"])
def test_a_key_may_have_any_letters(opened: Gateway, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Servers decode headers as latin-1, whatever clients send."""
    monkeypatch.setenv("KEYS", key)
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    opened.admit(f"Bearer {key}")
    opened.admit("Bearer " + key.encode().decode("latin-1") + " ")


@pytest.mark.parametrize(
    "header", [None, "", "k1", "Bearer ", "Bearer k", "Bearer k1, k2,", "Bearer K1", "Basic k1", "Bearer é"]
)
def test_nothing_else_opens(opened: Gateway, monkeypatch: pytest.MonkeyPatch, header: str | None) -> None:
    monkeypatch.setenv("KEYS", "k1, k2,")
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    with pytest.raises(Unauthorized):
        opened.admit(header)


@pytest.mark.parametrize("keys", ["", " , "])
def test_a_gateway_whose_keys_are_missing_does_not_open(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    monkeypatch.setenv("KEYS", keys)
    with pytest.raises(RuntimeError, match="api_keys_env is KEYS, but"):
        asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))


def test_the_table_of_a_gateway_changes_while_it_runs(opened: Gateway) -> None:
    one, two = a_model("one"), a_model("two")
    for models in ([one], [one, two], [two]):
        asyncio.run(opened.reconfigure(TABLE | {"models": [model.model_dump(mode="json") for model in models]}))
        assert opened.models() == {model.name: model for model in models}
        assert opened.max_body_bytes == 4096


def test_a_draining_gateway_takes_nothing_and_finishes_what_it_has(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = FakeBackend()
    monkeypatch.setattr(opened, "_generate", inner.generate)
    models = [model.model_dump(mode="json") for model in inner.models().values()]

    async def story() -> None:
        await opened.reconfigure(TABLE | {"models": models})
        request = replace(REQUEST, prompt="slow")
        running = asyncio.ensure_future(anext(opened.generate(request)))
        await asyncio.sleep(0)
        assert opened.in_flight == 1
        await opened.reconfigure(TABLE | {"models": models, "draining": True})
        with pytest.raises(ShuttingDown):
            await anext(opened.generate(REQUEST))
        assert opened.in_flight == 1
        inner.released.set()
        assert (await running).step == 1

    asyncio.run(story())
    assert len(inner.requests) == 1


def test_keys_that_are_missing_later_leave_those_that_were(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "k1")
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "NO_KEYS"}))
    opened.admit("Bearer k1")
    with pytest.raises(Unauthorized):
        opened.admit("Bearer k2")


class Answer:
    """A gang's answer that never comes."""

    def __init__(self) -> None:
        self.cancelled = False

    async def __anext__(self) -> Any:
        await asyncio.Event().wait()

    def __aiter__(self) -> Any:
        return self

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize(
    ("state", "raised"),
    [
        (
            ModelState("failed", "rank 0: no memory"),
            pytest.raises(ModelUnavailable, match="cannot be started: rank 0: no memory"),
        ),
        (None, pytest.raises(ModelNotFound, match="'one' was removed")),
    ],
)
def test_a_request_that_waits_for_nothing_ends(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, state: ModelState | None, raised: Any
) -> None:
    found = {"one": ModelState("starting", queued=1)}
    monkeypatch.setattr(gateway, "PATIENCE_S", 0.01)
    monkeypatch.setattr(gateway, "_applications", list)
    monkeypatch.setattr(opened, "states", lambda: found)
    answer = Answer()

    async def story() -> None:
        reports = opened._attended("one", answer)  # type: ignore[arg-type]
        assert await anext(reports) == found["one"]
        if state is None:
            del found["one"]
        else:
            found["one"] = state
        with raised:
            await anext(reports)

    asyncio.run(story())
    assert answer.cancelled


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_caller_who_leaves_with_a_report_in_hand_frees_the_gang(opened: Gateway, turns: int) -> None:
    class Steps(Answer):
        async def __anext__(self) -> Any:
            return StepEvent(1, 4, 0.1)

    answer = Steps()

    async def story() -> None:
        reports = opened._attended("one", answer)  # type: ignore[arg-type]
        await anext(reports)
        for _ in range(turns):
            await asyncio.sleep(0)
        await reports.aclose()

    asyncio.run(story())
    assert answer.cancelled


@pytest.mark.parametrize("turns", range(6))
def test_a_caller_who_is_cancelled_around_a_report_frees_the_gang(opened: Gateway, turns: int) -> None:
    arrived = asyncio.Event()

    class Late(Answer):
        async def __anext__(self) -> Any:
            await arrived.wait()
            return StepEvent(1, 4, 0.1)

    answer = Late()

    async def call() -> None:
        async with contextlib.aclosing(opened._attended("one", answer)) as reports:  # type: ignore[arg-type]
            async for _ in reports:
                await asyncio.Event().wait()

    async def story() -> None:
        calling = asyncio.ensure_future(call())
        await asyncio.sleep(0.01)
        arrived.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling

    asyncio.run(story())
    assert answer.cancelled


def test_how_requests_end_is_counted(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = a_model("counted")
    request = replace(REQUEST, model="counted")
    result = GenerationResult((b"",), (1,), ParallelDegrees(), 0.25, (0.25,), 0.5)
    answers: list[GenerationResult | Exception] = [GangLost("ranks"), result, RequestFailed("no"), result]
    answer = object.__new__(DeploymentResponseGenerator)
    handle = SimpleNamespace(generate=SimpleNamespace(remote=lambda request: answer))

    async def attended(*_: Any) -> AsyncGenerator[GenerationResult]:
        coming = answers.pop(0)
        if isinstance(coming, Exception):
            raise coming
        yield coming
        yield coming

    monkeypatch.setattr(gateway, "PAUSE_S", 0)
    monkeypatch.setattr(opened, "_handle", lambda model: handle)
    monkeypatch.setattr(opened, "_attended", attended)

    async def story() -> None:
        await opened.reconfigure(TABLE | {"models": [counted.model_dump(mode="json")]})
        async with contextlib.aclosing(opened.generate(request)) as reports:  # lost once, then answered
            assert await anext(reports) is result
            assert count("requests_in_flight") == 1
        with pytest.raises(RequestFailed):
            await anext(opened.generate(request))

    def count(name: str, **labels: str) -> float | None:
        return prometheus_client.REGISTRY.get_sample_value(f"spray_{name}", {"model": "counted", **labels})

    asyncio.run(story())
    outcomes = [count("requests_total", outcome=outcome) for outcome in ("ok", "generation_failed", "cancelled")]
    assert outcomes == [1, 1, 0]
    assert (count("request_losses_total"), count("requests_in_flight")) == (1, 0)
    assert (count("request_seconds_count"), count("queue_seconds_sum")) == (1, 0)  # computed longer than it took
