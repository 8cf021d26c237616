"""An elastic gang that has lost some of its ranks: what it has goes on on the others, then all are replaced."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from deploy.model_sections import Elastic as Section
from deploy.model_sections import LoRA
from tests.support.deployments import model
from tests.workers.gang_cases import CHALK, INK, in_replica, setup_of, supervisor_of
from tests.workers.test_elastic import REQUEST, Ranks, settled
from workers.errors import GangLost
from workers.gang.adapter_sync import AdapterSync
from workers.gang.gang import Gang
from workers.gang.gang_report import LOST, SOME_LOST
from workers.gang.stats import GangBacklog
from workers.messages import RankStatus, StepEvent


class GangRanks(Ranks):
    """Both ranks of a gang, as it sees them."""

    answering = has_answered = False
    startup_s = 600.0

    def __init__(self) -> None:
        super().__init__()
        self.statuses = [RankStatus(i, 70 + i, "node", "denoise", 0, "m", 1.0, 0) for i in range(2)]
        self.living = self.statuses

    async def room(self) -> None:
        pass

    async def set_loras(self, loras: Any) -> None:
        pass

    async def end(self) -> None:
        assert not self.parts, "whoever is on them has left"
        self.lost, self.living = "replaced", []

    def lose(self, gang: Gang, *numbers: int) -> None:
        if len(numbers) == len(self.living):
            self.lost, self.living = "died", []
        else:
            self.gone = frozenset(numbers)
            self.living = [status for status in self.statuses if status.rank not in numbers]
        supervisor_of(gang)._on_lost("died")


class Story:
    """A gang of two ranks that computes `a` on one of them and `b` on the other."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        in_replica(monkeypatch)
        spec = model(folder, ulysses_degree=2).model_copy(update={"elastic": Section()})
        self.gang, self.old, self.new = Gang(spec.fixed), GangRanks(), GangRanks()
        supervisor = self.gang._set_up(setup_of(spec))
        supervisor.ranks = self.old  # type: ignore[assignment]
        self.hurried: list[str] = []
        self.starts = 0
        monkeypatch.setattr(supervisor.spares, "hurry", lambda model, storage, name: self.hurried.append(name))
        monkeypatch.setattr(supervisor, "_start_ranks", self._start)

    async def _start(self) -> GangRanks:
        assert self.old.lost, "there would be no memory for both"
        self.starts += 1
        return self.new

    def ask(self, name: str, *loras: tuple[str, float]) -> "asyncio.Task[list[int]]":
        async def steps() -> list[int]:
            request = replace(REQUEST, request_id=name, num_inference_steps=6, report_steps=True, loras=loras)
            return [each.step async for each in self.gang.generate(request) if isinstance(each, StepEvent)]

        return asyncio.create_task(steps())

    async def side_by_side(self) -> "tuple[asyncio.Task[list[int]], asyncio.Task[list[int]]]":
        asked = self.ask("a"), self.ask("b")
        await settled()
        while len(self.old.parts) < 2:
            await self.old.step(next(iter(self.old.parts)))
        while self.gang._elastic._journeys["b"].steps_done < 3:  # type: ignore[union-attr]
            await self.old.step("b")
        return asked

    @property
    def steps_done(self) -> dict[str, int]:
        assert self.gang._elastic is not None
        return {name: journey.steps_done for name, journey in self.gang._elastic._journeys.items()}

    @property
    def rank_of_b(self) -> int:
        return self.old.blocks()["b"][0]


@pytest.fixture
def tell(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Story], Awaitable[None]]], None]:
    async def told(story: Callable[[Story], Awaitable[None]]) -> None:
        await asyncio.wait_for(story(Story(demo_model, monkeypatch)), 120)

    return lambda story: asyncio.run(told(story))


def test_both_end_on_the_rank_that_lives_and_who_comes_later_has_the_new_ones(tell: Any) -> None:
    async def story(at: Story) -> None:
        a, b = await at.side_by_side()
        lost = at.rank_of_b
        at.old.lose(at.gang, lost)
        await at.old.step("b", GangLost("died"))
        later = at.ask("later")
        await settled()
        assert set(at.old.parts) == {"a"} and at.starts == 0 and len(at.hurried) == 1
        at.gang.record_autoscaling_stats()
        labels = {"model": "demo", "replica": "0"}
        assert prometheus_client.REGISTRY.get_sample_value("spray_capacity_seconds", labels) == 0.5
        reported = at.gang.record_routing_stats()
        assert GangBacklog.from_stats(reported).replacing  # others take what comes
        assert (reported["now"]["trouble"], reported["now"]["pids"]) == (SOME_LOST, [70 + 1 - lost])
        while not (a.done() and b.done()):
            (running,) = at.old.parts
            await at.old.step(running)
        assert await a == [1, 2, 3, 4, 5, 6]
        assert await b == [1, 2, 3, 3, 4, 5, 6]  # kept after the second
        assert all(name == "b" or first == 1 - lost for name, first, _ in at.old.seen[-2:])
        await settled()
        assert at.starts == 1 and set(at.new.parts) == {"later"}
        assert at.gang.record_routing_stats()["now"]["trouble"] == ""
        for _ in range(6):
            await at.new.step("later")
        assert await later == [1, 2, 3, 4, 5, 6]

    tell(story)


def test_who_has_more_left_than_a_start_takes_is_paused_and_repeats_nothing(tell: Any) -> None:
    async def story(at: Story) -> None:
        at.old.startup_s = 0.05
        a, b = await at.side_by_side()
        at.old.lose(at.gang, at.rank_of_b)
        await at.old.step("b", GangLost("died"))
        await asyncio.sleep(0.2)
        assert set(at.old.parts) == {"a"} and at.starts == 0  # in the middle of a step
        await at.old.step("a")
        await settled()
        assert at.starts == 1 and at.new.parts and not a.done()
        while not (a.done() and b.done()):
            await at.new.step(next(iter(at.new.parts)))
        assert await a == [1, 2, 3, 4, 5, 6]
        assert await b == [1, 2, 3, 3, 4, 5, 6]
        assert {name for name, _, _ in at.new.seen} == {"a", "b"}

    tell(story)


def test_a_second_loss_is_that_of_all_and_one_replacement(tell: Any) -> None:
    async def story(at: Story) -> None:
        a, b = await at.side_by_side()
        while at.gang._elastic._journeys["a"].steps_done < 3:  # type: ignore[union-attr]
            await at.old.step("a")
        at.old.lose(at.gang, at.rank_of_b)
        await at.old.step("b", GangLost("died"))
        at.old.lose(at.gang, 1 - next(iter(at.old.gone)))
        assert at.gang.record_routing_stats()["now"]["trouble"] == LOST
        assert supervisor_of(at.gang)._losses == 1
        await at.old.step("a", GangLost("died"))
        await settled()
        assert at.starts == 1 and at.new.parts
        while not (a.done() and b.done()):
            await at.new.step(next(iter(at.new.parts)))
        assert await a == await b == [1, 2, 3, 3, 4, 5, 6]

    tell(story)


@pytest.mark.parametrize("deployed", [CHALK, INK.model_copy(update={"digest": "1" * 64})], ids=["gone", "another file"])
def test_what_has_lost_its_ranks_goes_on_with_the_same_adapters_or_not_here(tell: Any, deployed: LoRA) -> None:
    async def story(at: Story) -> None:
        adapters = at.gang._setup.adapters = AdapterSync((INK,))
        inked, plain = at.ask("a", ("ink", 1.0)), at.ask("b")
        await settled()
        while min(at.steps_done.values()) < 3:
            await at.old.step(min(at.old.parts, key=lambda name: at.steps_done[name]))
        adapters.want((deployed,))
        at.old.lose(at.gang, 0, 1)
        for name in list(at.old.parts):
            await at.old.step(name, GangLost("died"))
        await settled()
        assert adapters.loaded == (deployed,) and set(at.new.parts) == {"b"}
        with pytest.raises(GangLost, match="adapters of the request were replaced"):
            await inked
        for _ in range(4):
            await at.new.step("b")
        assert await plain == [1, 2, 3, 3, 4, 5, 6]

    tell(story)


def test_the_other_ranks_of_an_idle_gang_are_replaced_at_once(tell: Any) -> None:
    async def story(at: Story) -> None:
        at.old.lose(at.gang, 1)
        await settled()
        assert at.starts == 1 and at.hurried == []
        assert at.gang._elastic._ranks is at.new  # type: ignore[union-attr, comparison-overlap]  # they are idle now

    tell(story)
