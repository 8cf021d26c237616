"""The requests of an elastic gang: who gets which ranks, when one is told to pause, what is kept of it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deploy.families.lookup import find_family
from deploy.model_sections import Elastic as Section
from deploy.model_spec import ModelSpec
from sp_core.degrees import ParallelDegrees
from tests.support.deployments import model
from workers.errors import GangLost, RequestCancelled
from workers.gang.dealer import Block
from workers.gang.elastic import Elastic, slots
from workers.gang.elastic_rank_group import ElasticRankGroup
from workers.gang.journey import Journey
from workers.gang.step_costs import StepCosts
from workers.messages import Begun, Drawn, GenerationRequest, GenerationResult, Kept, Part, StepEvent

REQUEST = GenerationRequest("a", "demo", "a fox", width=64, height=64, num_inference_steps=4, seed=1)


class Ranks:
    """Ranks whose steps end when the test says so."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[Part, int, bytes]] = {}  # what runs: the part, its first rank, where it began
        self.seen: list[tuple[str, int, int]] = []
        self._told: dict[str, asyncio.Queue[Any]] = {}
        self._pausing: set[tuple[str, int]] = set()
        self._steps: dict[str, int] = {}
        self.cancelled: list[str] = []

    async def encode(self, request: GenerationRequest) -> bytes:
        return b"prompt"

    lost = ""
    gone: frozenset[int] = frozenset()

    def pause(self, request_id: str, part: int, ranks: range) -> None:
        assert ranks == range(self.parts[request_id][1], self.parts[request_id][1] + self.parts[request_id][0].ranks)
        self._pausing.add((request_id, part))

    def cancel(self, request_id: str, ranks: range) -> None:
        self.cancelled.append(request_id)

    async def advance(
        self, part: Part, first: int, encoded: bytes, progress: bytes, on_spans: Any
    ) -> AsyncGenerator[Any]:
        name, done = part.request.request_id, int(progress or b"0")
        assert encoded == b"prompt"
        self.parts[name] = part, first, progress
        self.seen.append((name, first, part.ranks))
        told = self._told.setdefault(name, asyncio.Queue())
        try:
            while done < part.request.num_inference_steps:
                if isinstance(await told.get(), GangLost):
                    raise GangLost("lost")
                done += 1
                yield StepEvent(done, part.request.num_inference_steps, 2.0 / part.ranks)
                pauses = (name, part.number) in self._pausing
                if pauses or done == 2:
                    yield Kept(done, str(done).encode(), pauses)
                if pauses:
                    return
            took = GenerationResult((), (1,), ParallelDegrees(), 0.0, (0.5,), 0.0)
            yield Drawn(name, took)
        finally:
            del self.parts[name]
            self._pausing.discard((name, part.number))

    async def step(self, name: str, what: Any = None) -> None:
        """End a step of a request, and let everybody see it."""
        self._told[name].put_nowait(what)
        await settled()

    def blocks(self) -> dict[str, tuple[int, int]]:
        """First rank and number of ranks of what runs."""
        return {name: (first, part.ranks) for name, (part, first, _) in self.parts.items()}


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def spec(demo_model: Path) -> ModelSpec:
    return model(demo_model, ulysses_degree=2, tensor_parallel_size=2).model_copy(update={"elastic": Section()})


@pytest.fixture
def elastic(spec: ModelSpec) -> Elastic:
    return Elastic(spec, find_family(Path(spec.source)))


def drive(story: Callable[[Ranks, Callable[[str], "asyncio.Task[list[Any]]"]], Any], elastic: Elastic) -> Any:
    """Run a story with ranks, and a way to begin a request."""

    async def told() -> Any:
        ranks = Ranks()

        async def collect(journey: Journey) -> list[Any]:
            async with contextlib.aclosing(elastic.run(cast("ElasticRankGroup", ranks), journey)) as reports:
                return [report async for report in reports]

        def begin(name: str, **changes: Any) -> "asyncio.Task[list[Any]]":
            return asyncio.create_task(collect(elastic.begin(replace(REQUEST, request_id=name, **changes))))

        return await story(ranks, begin)

    return asyncio.run(told())


def test_a_request_alone_has_all_ranks_in_whole_tensor_groups(elastic: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        asked = begin("a")
        await settled()
        assert ranks.blocks() == {"a": (0, 4)}
        assert elastic.busy == 1.0
        for _ in range(4):
            await ranks.step("a")
        begun, *steps, drawn = await asked
        assert begun == Begun()
        assert [step.step for step in steps] == [1, 2, 3, 4]
        assert drawn.took.step_seconds == (0.5,) * 4
        assert not elastic.has_work

    drive(story, elastic)


def test_a_second_one_gets_half_of_the_ranks_after_a_step_and_gives_them_back(elastic: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        first = begin("a", num_inference_steps=8)
        await settled()
        second = begin("b", num_inference_steps=2)
        await settled()
        assert ranks.blocks() == {"a": (0, 4)}  # in the middle of a step
        await ranks.step("a")
        assert sorted(ranks.blocks().values()) == [(0, 2), (2, 2)]
        assert elastic.standing == [
            {"request_id": "a", "ranks": [0, 1], "step": 1, "total_steps": 8, "eta_s": pytest.approx(4.3)},
            {"request_id": "b", "ranks": [2, 3], "step": 0, "total_steps": 2, "eta_s": pytest.approx(1.8)},
        ]
        await ranks.step("b")
        await ranks.step("b")
        await second
        await ranks.step("a")
        assert ranks.blocks() == {"a": (0, 4)}
        assert ranks.parts["a"][2] == b"2"  # from where it stood
        assert elastic.changes == {"move": 1, "pause": 0}  # no step with the latest ranks has ended yet
        for _ in range(6):
            await ranks.step("a")
        _, *steps, drawn = await first
        assert elastic.take_counts()[1] == {"move": 2, "pause": 0}
        assert elastic.take_counts()[1] == {"move": 0, "pause": 0}
        assert [step.step for step in steps] == list(range(1, 9))
        assert len(drawn.took.step_seconds) == 8

    drive(story, elastic)


def test_what_is_urgent_makes_something_stand_still_which_then_can_be_cancelled(elastic: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        tasks = [begin(name, num_inference_steps=40) for name in ("a", "b")]
        await settled()
        await ranks.step("a")
        await ranks.step("b") if "b" in ranks.parts else None
        short = begin("c", num_inference_steps=2)
        await settled()
        for name in ("a", "b"):
            await ranks.step(name)
        assert "c" in ranks.parts
        (stopped,) = {"a", "b"} - set(ranks.parts)
        assert elastic.changes["pause"] >= 1
        elastic.cancel(cast("ElasticRankGroup", ranks), stopped)
        with pytest.raises(RequestCancelled):
            await tasks["ab".index(stopped)]
        short.cancel()
        for task in tasks:
            task.cancel()
        await settled()
        assert not elastic.has_work

    drive(story, elastic)


def test_a_request_begins_when_it_first_has_ranks_and_once(elastic: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        said: dict[str, list[Any]] = {}

        async def listen(name: str) -> None:
            journey = elastic.begin(replace(REQUEST, request_id=name, num_inference_steps=4))
            async for report in elastic.run(cast("ElasticRankGroup", ranks), journey):
                said.setdefault(name, []).append(report)

        tasks = [asyncio.create_task(listen(name)) for name in "abc"]
        await settled()
        (stands,) = {*"abc"} - {*ranks.parts} if len(ranks.parts) == 2 else {"c"}
        assert stands not in said, "it has no ranks: it is not the cause of what happens"
        while not all(task.done() for task in tasks):
            for name in list(ranks.parts):
                await ranks.step(name)
            assert said.keys() >= ranks.parts.keys()
        for reports in said.values():
            assert [each for each in reports if isinstance(each, Begun)] == reports[:1]

    drive(story, elastic)


def test_who_loses_ranks_to_its_prompts_has_begun(elastic: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        async def encode(_: GenerationRequest) -> bytes:
            raise GangLost("rank 0 died")

        ranks.encode = encode  # type: ignore[method-assign]
        journey, said = elastic.begin(REQUEST), []
        with pytest.raises(GangLost):
            async for report in elastic.run(cast("ElasticRankGroup", ranks), journey):
                said.append(report)
        assert said == [Begun()] and not journey.fall_back(ranks)

    drive(story, elastic)


def test_lost_ranks_take_a_request_back_to_what_was_kept_once(elastic: Elastic) -> None:
    async def story(ranks: Ranks, _: Any) -> None:
        journey = elastic.begin(replace(REQUEST, num_inference_steps=6))

        async def part(steps: int) -> None:
            running = asyncio.create_task(anext_all(elastic.run(cast("ElasticRankGroup", ranks), journey)))
            await settled()
            for _ in range(steps):
                await ranks.step("a")
            await ranks.step("a", GangLost("lost"))
            with pytest.raises(GangLost):
                await running

        await part(3)  # kept after the second
        assert journey.fall_back("ranks")
        assert (journey.steps_done, journey.step_s, journey.unit_s) == (2, [0.5, 0.5], [1.0, 1.0])
        await part(1)
        assert journey.fall_back("ranks")  # those that had outlived the first
        assert journey.steps_done == 2
        await part(1)
        assert not journey.fall_back("new ranks")

    drive(story, elastic)


def test_only_a_request_that_had_the_ranks_may_be_the_cause_of_their_loss(elastic: Elastic) -> None:
    innocent, suspect = elastic.begin(REQUEST), elastic.begin(REQUEST)
    suspect.computes = True
    assert not suspect.fall_back(0)  # nothing was kept of it
    assert [innocent.fall_back(i) for i in range(3)] == [True] * 3


def test_only_ranks_that_live_and_have_no_request_are_idle(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("workers.gang.elastic.time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    elastic = Elastic(spec, find_family(Path(spec.source)))

    async def story(ranks: Ranks, begin: Any) -> None:
        nonlocal now

        def idle_s(passed_s: float) -> float:
            nonlocal now
            now += passed_s
            return elastic.take_counts()[0]

        assert idle_s(100) == 0.0
        elastic.follow(cast("ElasticRankGroup", ranks))  # they have started
        assert idle_s(10) == 40.0
        running = begin("a", num_inference_steps=1)
        await settled()
        assert idle_s(10) == 0.0
        await ranks.step("a")
        await running
        ranks.gone = frozenset({0, 1})
        assert idle_s(10) == 20.0
        ranks.lost = "died"
        assert idle_s(60) == 0.0
        now += 60
        elastic.follow(cast("ElasticRankGroup", Ranks()))
        assert idle_s(1) == 4.0

    drive(story, elastic)


def test_who_waits_is_dealt_no_ranks_that_are_lost(elastic: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        ranks.lost = "rank 1 died"
        waits = begin("a")
        with pytest.raises(GangLost):
            await waits
        assert not ranks.seen and not elastic.has_work

    drive(story, elastic)


@pytest.fixture
def singles(demo_model: Path) -> Elastic:
    """A gang whose four ranks may each have a request."""
    spec = model(demo_model, ulysses_degree=4).model_copy(update={"elastic": Section()})
    return Elastic(spec, find_family(Path(spec.source)))


def test_what_has_lost_its_rank_goes_on_beside_what_has_not(singles: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        beside = [begin(name, num_inference_steps=8) for name in ("b", "c", "d")]
        hit = singles.begin(replace(REQUEST, num_inference_steps=8))
        running = asyncio.create_task(anext_all(singles.run(cast("ElasticRankGroup", ranks), hit)))
        await settled()
        while len(ranks.parts) < 4:
            await ranks.step(next(iter(ranks.parts)))
        for _ in range(3):
            await ranks.step("a")
        first = ranks.blocks()["a"][0]
        ranks.gone = frozenset({first})
        await ranks.step("a", GangLost("lost"))
        with pytest.raises(GangLost):
            await running
        assert hit.fall_back(ranks) and singles.can_go_on(cast("ElasticRankGroup", ranks), hit)
        parts = {name: part.number for name, (part, _, _) in ranks.parts.items()}
        again = asyncio.create_task(anext_all(singles.run(cast("ElasticRankGroup", ranks), hit)))
        await settled()
        for name in parts:  # each ends a step; nobody is given the lost rank
            await ranks.step(name) if name in ranks.parts else None
            assert all(first not in range(at, at + size) for at, size in ranks.blocks().values())
        for name in ("b", "c", "d", "a") * 12:
            await ranks.step(name) if name in ranks.parts else None
            assert all(first not in range(at, at + size) for at, size in ranks.blocks().values())
        steps = [each.step for each in await again if isinstance(each, StepEvent)]
        assert steps == list(range(3, 9))  # kept after the second
        for each in beside:
            assert [step.step for step in (await each)[1:-1]] == list(range(1, 9))

    drive(story, singles)


def test_all_leave_after_their_step_when_others_come(singles: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        runs, waits = begin("a", num_inference_steps=8), None
        profiled = begin("p", num_inference_steps=2, profile=True)
        await settled()
        await ranks.step("a")
        assert set(ranks.parts) == {"a", "p"}
        singles._degrees = [1]
        waits = [begin(f"w{i}", num_inference_steps=8) for i in range(4)]
        await settled()
        assert len(ranks.parts) <= 4
        stands = [each for each, name in zip(waits, ("w0", "w1", "w2", "w3"), strict=True) if name not in ranks.parts]
        assert stands
        ranks.gone = frozenset({3})
        singles.leave(cast("ElasticRankGroup", ranks))
        await settled()
        for each in stands:  # at once
            with pytest.raises(GangLost, match="too few ranks"):
                await each
        kept = {name: part.number for name, (part, _, _) in ranks.parts.items()}
        for name in kept:
            await ranks.step(name)
        with pytest.raises(GangLost, match="all are replaced"):
            await runs
        assert set(ranks.parts) == {"p"}  # half a profile is none
        await ranks.step("p")
        assert isinstance((await profiled)[-1], Drawn)
        assert not singles.can_go_on(cast("ElasticRankGroup", ranks), singles.begin(REQUEST))
        for each in waits:
            each.cancel()

    drive(story, singles)


def test_who_needs_what_is_lost_leaves(spec: ModelSpec) -> None:
    narrow = Elastic(spec.model_copy(update={"elastic": Section(min_degree=2)}), find_family(Path(spec.source)))

    async def story(ranks: Ranks, begin: Any) -> None:
        ranks.gone = frozenset({1})
        with pytest.raises(GangLost):
            await begin("a")  # two units are needed, and one is lost
        assert not ranks.seen

    drive(story, narrow)
    plain = Elastic(spec, find_family(Path(spec.source)))

    async def encoders(ranks: Ranks, _: Any) -> None:
        plain._ranks = cast("ElasticRankGroup", ranks)
        ranks.gone = frozenset({0})
        journey = plain.begin(REQUEST)
        assert not plain.can_go_on(cast("ElasticRankGroup", ranks), journey)  # rank 0 has the text encoders
        journey.encoded = b"prompt"
        assert plain.can_go_on(cast("ElasticRankGroup", ranks), journey)

    drive(encoders, plain)


def test_a_cancellation_between_two_parts_is_not_forgotten(elastic: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        first = begin("a", num_inference_steps=8)
        await settled()
        second = begin("b", num_inference_steps=8)
        await settled()
        elastic.cancel(cast("ElasticRankGroup", ranks), "a")  # its ranks have passed their last boundary of this part
        assert ranks.cancelled == ["a"]
        await ranks.step("a")
        with pytest.raises(RequestCancelled):
            await first
        assert ranks.blocks() == {"b": (0, 4)}
        second.cancel()

    drive(story, elastic)


@pytest.mark.parametrize("stands", [False, True])
def test_who_is_asked_for_again_ends_first(elastic: Elastic, stands: bool) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        others = [begin(name) for name in "bc"] if stands else []
        await settled()
        former = begin("a", priority="batch")
        await settled()
        assert ("a" in ranks.parts) is not stands
        again = begin("a")
        await settled()
        if not stands:
            assert ranks.seen == [("a", 0, 4)], "the ranks know one request of a name"
            await ranks.step("a")
        assert isinstance(former.exception(), RequestCancelled)
        for name in ["b", "c"] * 4 * stands + ["a"] * 4:
            await ranks.step(name)
        assert isinstance((await again)[-1], Drawn)
        await asyncio.gather(*others)
        assert not elastic.has_work and ranks.cancelled == []

    drive(story, elastic)


async def anext_all(reports: AsyncGenerator[Any]) -> list[Any]:
    async with contextlib.aclosing(reports):
        return [report async for report in reports]


def test_a_profiled_request_keeps_its_ranks_and_teaches_no_costs(elastic: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        profiled = begin("a", num_inference_steps=4, profile=True)
        await settled()
        second = begin("b", num_inference_steps=1)
        await settled()
        for _ in range(3):
            await ranks.step("a")
        assert ranks.blocks() == {"a": (0, 4)} and not elastic.costs.any_known
        await ranks.step("a")
        await profiled
        await ranks.step("b")
        await second
        assert elastic.costs.any_known

    drive(story, elastic)


def test_how_many_requests_a_gang_takes(spec: ModelSpec) -> None:
    assert slots(spec) == 4
    assert slots(spec.model_copy(update={"elastic": None})) == 1


def test_costs_are_measured_and_the_rest_is_scaled() -> None:
    costs, large = StepCosts(), replace(REQUEST, width=128)
    assert costs.seconds(REQUEST, 1, [1, 2])[1] == 1.0
    for seconds in (9.0, 1.0, 1.0):  # the first is cold
        costs.observe(REQUEST, 1, 2, seconds)
    assert costs.seconds(REQUEST, 1, [1, 2, 4]) == pytest.approx({1: 1.8, 2: 1.0, 4: 0.5 / 0.9})
    assert costs.seconds(large, 1, [2]) == pytest.approx({2: 2.0})
    assert costs.seconds(REQUEST, 2, [2]) == pytest.approx({2: 2.0})
    costs.observe(REQUEST, 1, 4, 2.0)
    assert costs.seconds(REQUEST, 1, [4])[4] == pytest.approx(0.5 / 0.9)  # one slow step proves nothing
    for _ in range(2):
        costs.observe(REQUEST, 1, 4, 2.0)
    assert costs.seconds(REQUEST, 1, [2, 4]) == {2: 1.0, 4: 2.0}  # it does not pay


def test_the_ranks_of_a_request_that_decodes_are_free_but_one(elastic: Elastic) -> None:
    assert elastic._degrees == [1, 2]
    journey = elastic.begin(REQUEST)
    elastic._step(journey, StepEvent(4, 4, 0.5), Block(0, 2))
    assert journey.at == Block(0, 1)
