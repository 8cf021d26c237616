"""Processes that wait to take the places of lost ranks."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deploy.storage_spec import Storage
from tests.support.deployments import model
from tests.support.waiting import until
from workers.gang import spare_ranks
from workers.gang.spare_ranks import SpareRanks

MODEL = model(Path("/nowhere"), ulysses_degree=2).model_copy(update={"spare_ranks": True})


class Process:
    """Says where it is; or nothing, or that it has died."""

    def __init__(self, state: str = "alive") -> None:
        self.state, self.imports = state, 0
        self.place = SimpleNamespace(remote=self._place)
        self.import_libraries = SimpleNamespace(remote=self._import)

    async def _place(self) -> None:
        if self.state == "hung":
            await asyncio.Event().wait()
        if self.state == "dead":
            raise RayActorError

    async def _import(self, elastic: bool) -> None:
        await self._place()
        self.imports += 1


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(spare_ranks.ray, "kill", found.append)
    monkeypatch.setattr(spare_ranks, "REST_S", 0.02)
    monkeypatch.setattr(spare_ranks, "ANSWER_S", 0.1)
    return found


def spares(monkeypatch: pytest.MonkeyPatch, *made: Process) -> SpareRanks:
    """Those of a gang that has just started; these processes are made."""
    monkeypatch.setattr(spare_ranks, "create", lambda model, storage, name, spare: list(made) if spare else None)
    found = SpareRanks()
    found.refill(MODEL, Storage(), "a")
    return found


def test_they_are_made_later_and_taken_once(killed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        made = [Process(), Process()]
        found = spares(monkeypatch, *made)
        await until(lambda: found.ready == 2)
        assert [process.imports for process in made] == [1, 1]
        assert await found.take() == made
        assert (await found.take(), found.ready) == ([], 0)
        soon = spares(monkeypatch, *made)
        assert await soon.take() == []  # lost at once: none is made anymore
        await asyncio.sleep(0.1)
        assert [process.imports for process in made] == [1, 1]
        assert killed == []

    asyncio.run(story())


@pytest.mark.parametrize("state", ["hung", "dead"])
def test_one_that_is_gone_makes_all_useless(killed: list[Any], monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    async def story() -> None:
        made = [Process(), Process()]
        found = spares(monkeypatch, *made)
        await until(lambda: found.ready == 2)
        made[1].state = state
        assert await found.take() == []
        assert killed == made

    asyncio.run(story())


def test_one_that_dies_while_it_imports_is_no_harm(killed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        made = [Process("dead"), Process()]
        found = spares(monkeypatch, *made)
        await until(lambda: killed)
        assert killed == made
        assert await found.take() == []

    asyncio.run(story())


def test_they_are_made_at_once_if_they_are_needed_soon(killed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_ranks, "REST_S", 600.0)

    async def story() -> None:
        made = [Process(), Process()]
        found = spares(monkeypatch, *made)  # which would rest first
        found.hurry(MODEL, Storage(), "b")
        await until(lambda: found.ready == 2)
        found.hurry(MODEL, Storage(), "c")  # they are there
        await asyncio.sleep(0.05)
        assert [process.imports for process in made] == [1, 1]
        assert await found.take() == made

    asyncio.run(story())
