"""The poller asks Serve often while something changes, and seldom while all is well."""

import asyncio
from typing import Any

import pytest
from ray.serve.schema import ApplicationStatusOverview, ServeStatus

from deploy.model_sections import Autoscaling
from service.names import app_name
from service.state import poller
from service.state.model_states import ModelState
from service.state.poller import Poller
from tests.support.backend import a_model

WELL = ModelState("running", replicas={"RUNNING": 1})


@pytest.mark.parametrize(
    ("state", "often"),
    [
        (WELL, False),
        (ModelState("asleep"), False),
        (ModelState("starting", replicas={"STARTING": 1}), True),
        (ModelState("running", replicas={"RUNNING": 1, "STARTING": 1}), True),
        (ModelState("running", "a gang has lost its ranks", replicas={"RUNNING": 1}), True),
        (ModelState("running", replicas={"RUNNING": 1}, queued=1), True),
        (ModelState("running", replicas={"RUNNING": 2}, queued=1), False),  # no more gangs may come
        (ModelState("running", replicas={"RUNNING": 2, "STARTING": 1}, queued=1), True),
        (ModelState("asleep", queued=1), True),
    ],
)
def test_serve_is_asked_often_only_while_something_changes(
    monkeypatch: pytest.MonkeyPatch, state: ModelState, often: bool
) -> None:
    reads, states = [], []

    def read() -> tuple[Any, list[Any], list[Any], dict[str, int]]:
        reads.append(1)
        return ServeStatus(), [], [], {}

    def model_state(*_: Any, **__: Any) -> ModelState:
        states.append(1)
        return state

    monkeypatch.setattr(poller, "_read", read)
    monkeypatch.setattr(poller, "model_state", model_state)

    async def story() -> None:
        ours = Poller(dict)
        ours._models = {"one": a_model("one", autoscaling=Autoscaling(max_replicas=2))}
        for _ in range(5):
            await ours._poll()
        assert (len(reads), len(states)) == (5 if often else 1, 5)
        reads.clear()
        ours.follow({"two": a_model("two")})  # a new table is looked at at once
        async with asyncio.timeout(60):
            while not reads:
                await asyncio.sleep(0.01)

    asyncio.run(story())


def test_each_model_that_serve_knows_is_greeted(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ServeStatus(applications={app_name("one"): ApplicationStatusOverview("DEPLOYING", "", 0.0, {})})  # type: ignore[arg-type]
    monkeypatch.setattr(poller, "_read", lambda: (known, [], [], {}))
    greeted: list[str] = []

    async def story() -> None:
        ours = Poller(dict, greeted.append)
        ours._models = {name: a_model(name) for name in ("one", "two")}
        await ours._poll()

    asyncio.run(story())
    assert greeted == ["one"]
