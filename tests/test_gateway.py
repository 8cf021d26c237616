"""The gateway itself, without Serve: who is let in, its table while it runs, and what it still takes when it drains."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.serve.schema import ServeStatus

from service import gateway
from service.gateway import Gateway
from tests.hall import Hall, a_model
from workers.errors import ShuttingDown, Unauthorized
from workers.messages import GenerationRequest

REQUEST = GenerationRequest("a", "one", "a cup", 64, 64, 4, seed=1)
TABLE = {"models": [], "draining": False, "max_body_bytes": 4096, "api_keys_env": None}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """A gateway that sees no cluster."""

    async def watch(self: Gateway) -> None: ...

    monkeypatch.setattr(Gateway, "_watch", watch)
    return Gateway("test")


@pytest.mark.parametrize("header", ["Bearer k1", "Bearer k2", "k2"])
def test_each_of_several_keys_opens(opened: Gateway, monkeypatch: pytest.MonkeyPatch, header: str) -> None:
    opened.admit(None)  # until keys are asked for
    monkeypatch.setenv("KEYS", "k1, k2,")
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    opened.admit(header)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer ", "Bearer k", "Bearer k1, k2,", "Bearer K1", "Basic k1", "Bearer é"]
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
    inner = Hall()
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


def test_a_model_that_goes_while_the_cluster_is_looked_at(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(["first"])
    opened._models = {name: a_model(name) for name in ("one", "two")}

    def look() -> tuple[Any, list[Any], dict[str, float]]:
        if next(looks, None) is None:
            del opened._models["two"]
        return ServeStatus(), [], {}

    monkeypatch.setattr(gateway, "_look", look)
    monkeypatch.setattr(opened, "_handle", lambda name: None)
    assert [model["id"] for model in asyncio.run(opened.cluster())["models"]] == ["one"]
