"""Ranks that are lost are replaced, and whoever had not begun on them does not notice."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.model_spec import ModelSpec
from tests.workers.gang_cases import (
    CHALK,
    INK,
    FakeRanks,
    ask,
    deploy,
    gang_with_ink,
    in_replica,
    settled,
    setup_of,
    supervisor_of,
)
from workers.errors import GangLost
from workers.gang.gang import Gang
from workers.gang.stats import GangBacklog
from workers.gang.supervisor import Supervisor
from workers.messages import Begun


@pytest.fixture
def inked(monkeypatch: pytest.MonkeyPatch) -> tuple[Gang, FakeRanks]:
    return gang_with_ink(monkeypatch)


def test_adapters_that_were_deployed_before_a_loss_reach_the_new_ranks(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    gang, ranks = inked
    started: list[FakeRanks] = []

    async def start(model: ModelSpec, processes: list[Any], *_: Any) -> FakeRanks:
        assert processes == ["fresh"]
        started.append(FakeRanks(model.loras))
        return started[-1]

    monkeypatch.setattr("workers.gang.supervisor.RankGroup.start", start)

    async def story() -> None:
        running = asyncio.ensure_future(ask(gang))
        await settled(gang)
        await deploy(gang, CHALK)
        ranks.lost = GangLost("struck")
        supervisor_of(gang)._on_lost("died")
        ranks.finish.set()
        with pytest.raises(GangLost):
            await running
        assert await settled(gang) == ""
        assert supervisor_of(gang).spares._refilling is None  # nobody has asked for spare ranks
        (new,) = started
        assert (new.asked, new.loras) == ([(CHALK,)], (CHALK,))

    asyncio.run(story())


def test_ranks_that_never_answer_count_as_lost_in_a_row(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that draw, and end while they encode."""
    gang, ranks = inked
    supervisor = supervisor_of(gang)
    monkeypatch.setattr(supervisor, "_replace_ranks", lambda: asyncio.sleep(0))

    async def story() -> None:
        counts = []
        for answered in (False, False, True, False):
            ranks.has_answered = answered
            supervisor._on_lost("died")
            counts.append(supervisor._losses)
            supervisor._whole.set()  # they are replaced
        assert counts == [1, 2, 1, 2]
        await asyncio.sleep(0)

    asyncio.run(story())


def test_a_request_that_waits_while_ranks_are_lost_runs_on_the_new_ones(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not begun, so it must not count as a request that cost a gang."""
    gang, _ = inked
    new, may = FakeRanks((INK,)), asyncio.Event()

    async def start(*_: Any) -> FakeRanks:
        await may.wait()
        return new

    monkeypatch.setattr("workers.gang.supervisor.RankGroup.start", start)
    monkeypatch.setattr("workers.gang.supervisor.RankGroup.run", None)

    async def story() -> None:
        async with supervisor_of(gang).alone():  # a change of adapters, during which the ranks are lost
            asked = asyncio.ensure_future(ask(gang))
            await settled(gang)
            supervisor_of(gang)._on_lost("died")
        await settled(gang)
        assert not asked.done()
        assert GangBacklog.from_stats(gang.record_routing_stats()).replacing
        new.finish.set()
        may.set()
        assert await asked == [Begun(), "done"]
        assert not GangBacklog.from_stats(gang.record_routing_stats()).replacing

    asyncio.run(story())


def test_a_request_waits_for_room_and_outlives_the_ranks_meanwhile(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many answers are open. The gang is busy then, but has not begun."""
    gang, ranks = inked
    new = FakeRanks((INK,))

    async def start(*_: Any) -> FakeRanks:
        return new

    monkeypatch.setattr("workers.gang.supervisor.RankGroup.start", start)

    async def story() -> None:
        ranks.has_room.clear()
        asked = asyncio.ensure_future(ask(gang))
        await settled(gang)
        assert GangBacklog.from_stats(gang.record_routing_stats()).busy
        supervisor_of(gang)._on_lost("died")
        ranks.lost = GangLost("struck")
        ranks.finish.set()
        ranks.has_room.set()
        new.finish.set()
        assert await asked == [Begun(), "done"]
        assert not GangBacklog.from_stats(gang.record_routing_stats()).busy

    asyncio.run(story())


def test_only_the_first_ranks_of_a_gang_test_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacements come back fast: of them only the groups are tried."""
    spec = ModelSpec(name="tested", source="/a")
    in_replica(monkeypatch)
    started: list[bool] = []

    async def start(model: ModelSpec, *_: Any) -> Any:
        started.append(model.self_test)
        return SimpleNamespace(phases={"load": 1.0}, serve_metrics=lambda: None)

    monkeypatch.setattr("workers.gang.supervisor.RankGroup.start", start)

    async def story() -> None:
        supervisor = Supervisor(setup_of(spec), None)
        for _ in range(2):
            await supervisor.start()

    asyncio.run(story())
    assert started == [True, False]


def test_lost_ranks_are_replaced_by_spare_processes_if_there_are_any(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    gang, _ = inked
    supervisor = supervisor_of(gang)
    gang._setup.model = gang._setup.model.model_copy(update={"spare_ranks": True})
    used: list[list[Any]] = []
    refilled: list[str] = []

    async def start(model: ModelSpec, processes: list[Any], *_: Any) -> FakeRanks:
        used.append(processes)
        return FakeRanks(model.loras)

    async def take() -> list[Any]:
        return ["spare"] if len(used) == 0 else []

    monkeypatch.setattr("workers.gang.supervisor.RankGroup.start", start)
    monkeypatch.setattr(supervisor.spares, "take", take)
    monkeypatch.setattr(supervisor.spares, "refill", lambda model, storage, name: refilled.append(name))

    async def story() -> None:
        for _ in range(2):
            supervisor._on_lost("died")
            assert supervisor._replacement is not None
            await supervisor._replacement
        assert used == [["spare"], ["fresh"]]
        assert refilled == ["inked-r-1", "inked-r-2"]

    asyncio.run(story())
