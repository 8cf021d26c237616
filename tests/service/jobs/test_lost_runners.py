"""Which other gateways that run jobs have died."""

import asyncio
import threading

import pytest

from service.jobs.lost_runners import LostRunners


def test_who_is_gone() -> None:
    """A runner of another cluster was never seen here, alive or not."""
    alive = {"a", "b"}

    async def story() -> None:
        lost = LostRunners("own", lambda runner: runner in alive)
        runners = ["own", "", "a", "b", "elsewhere", "a"]
        assert await lost.among(runners) == []
        assert lost.strangers == {"elsewhere"}
        alive.remove("a")
        assert await lost.among(runners) == ["a"]
        assert await lost.among(runners) == []  # its leases have ended
        assert await lost.among(["b"]) == []

    asyncio.run(story())


def test_a_look_that_takes_long_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.lost_runners.LOOK_S", 0.01)
    answers, alive, looks = threading.Event(), {"a"}, []

    def lives(runner: str) -> bool:
        looks.append(runner)
        answers.wait()
        return runner in alive

    async def story() -> None:
        lost = LostRunners("own", lives)
        for _ in range(3):
            assert await lost.among(["a"]) == []
        assert looks == ["a"]  # one look, however often somebody asks
        answers.set()
        while "a" not in lost._seen:
            await lost.among(["a"])
        alive.clear()
        found: list[str] = []
        while not found:
            found = await lost.among(["a"])
        assert found == ["a"]

    asyncio.run(story())
