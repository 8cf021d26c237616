"""Requests of an elastic gang that make room for others, that end too late, and what the gang learns from each."""

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import pytest

from deploy.families.lookup import find_family
from deploy.model_sections import Elastic as Section
from service.deadline import within
from tests.support.deployments import model
from tests.workers.test_elastic import REQUEST, Ranks, drive, settled
from workers.errors import DeadlineExceeded
from workers.gang.elastic import Elastic
from workers.gang.elastic_rank_group import ElasticRankGroup
from workers.gang.journey import Journey


@pytest.fixture
def elastic(demo_model: Path) -> Elastic:
    spec = model(demo_model, ulysses_degree=4).model_copy(update={"elastic": Section()})
    return Elastic(spec, find_family(Path(spec.source)))


def know(elastic: Elastic, seconds: dict[int, float]) -> None:
    """Let it have measured these seconds of a step at each degree."""
    for degree, each in seconds.items():
        for _ in range(3):
            elastic.costs.observe(REQUEST, 1, degree, each)


def test_several_pause_for_one_that_needs_all_ranks(elastic: Elastic) -> None:
    know(elastic, {1: 2.0, 2: 1.0, 4: 0.5})

    async def story(ranks: Ranks, begin: Any) -> None:
        names = [f"long {i}" for i in range(4)]
        tasks = [begin(name, num_inference_steps=50, priority="batch") for name in names]
        await settled()
        while len(ranks.parts) < 4:  # the first has had all ranks
            await ranks.step(next(iter(ranks.parts)))
        assert sorted(ranks.blocks().values()) == [(i, 1) for i in range(4)]
        tasks.append(begin("wide", num_inference_steps=20, deadline_at=time.time() + 15.0))
        await settled()
        for name in names:
            assert "wide" not in ranks.parts
            await ranks.step(name)
        assert ranks.blocks() == {"wide": (0, 4)}
        for _ in range(20):
            await ranks.step("wide")
        assert len(ranks.parts) == 4
        for task in tasks:
            task.cancel()
        await settled()
        assert not elastic.has_work

    drive(story, elastic)


@pytest.mark.parametrize("stands", [True, False])
def test_a_deadline_ends_a_request_with_ranks_or_without(elastic: Elastic, stands: bool) -> None:
    know(elastic, {1: 1.0, 2: 1.0, 4: 1.0})  # nobody is given more than one rank

    async def story(ranks: Ranks, begin: Any) -> None:
        others = [begin(f"{i}", num_inference_steps=9) for i in range(4 if stands else 3)]
        await settled()
        late = elastic.begin(REQUEST)
        collected = asyncio.create_task(collect(ranks, late, time.time() + 0.05))
        await settled()
        assert ("a" in ranks.parts) == (not stands)
        with pytest.raises(DeadlineExceeded):
            await collected
        assert "a" not in ranks.parts
        assert {each["request_id"] for each in elastic.standing} == {str(i) for i in range(len(others))}
        for other in others:
            other.cancel()
        await settled()

    async def collect(ranks: Ranks, journey: Journey, deadline_at: float) -> None:
        async for _ in within(deadline_at, elastic.run(cast("ElasticRankGroup", ranks), journey)):
            pass

    drive(story, elastic)


def test_what_a_request_costs_the_gang_and_would_take_at_best(elastic: Elastic) -> None:
    """Two steps on four ranks, at half a second, and two on two ranks, at a whole one; a second outside, on one."""
    journey = elastic.begin(REQUEST)
    journey.step_s, journey.unit_s = [0.5, 0.5, 1.0, 1.0], [0.5 * 4] * 2 + [1.0 * 2] * 2
    know(elastic, {2: 1.0, 4: 0.5})
    took = type("Took", (), {"encode_seconds": 0.25, "decode_seconds": 0.75})
    share, least_step_s = elastic.learned(journey, cast("Any", took))
    assert share == pytest.approx((8 + 1) / (4 * 4.0))
    assert least_step_s == 0.5


def test_what_is_left_counts_what_comes_after_the_last_step(elastic: Elastic) -> None:
    async def story(ranks: Ranks, begin: Any) -> None:
        task = begin("a")
        await settled()
        assert elastic.remaining_s == 0.0  # nobody knows what a step takes
        assert elastic.standing[0]["eta_s"] is None
        know(elastic, {1: 1.0, 2: 0.5, 4: 0.25})
        assert elastic.remaining_s == pytest.approx(4 * 1.0 / 4)
        assert elastic.standing[0]["eta_s"] == pytest.approx(4 * 0.25)
        elastic.costs.observe_tail(REQUEST, 2.0)
        assert elastic.remaining_s == pytest.approx((4 * 1.0 + 2.0) / 4)
        assert elastic.standing[0]["eta_s"] == pytest.approx(4 * 0.25 + 2.0)
        task.cancel()
        await settled()

    drive(story, elastic)
