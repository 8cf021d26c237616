"""A lost rank takes with it who may wait for it in a collective; the others of an elastic gang go on."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError

from deploy.model_sections import Elastic
from deploy.model_spec import ModelSpec
from tests.support.deployments import model
from tests.workers.test_elastic import REQUEST
from workers.errors import GangLost
from workers.gang.elastic_rank_group import ElasticRankGroup
from workers.gang.losses import Losses
from workers.messages import Part, RankStatus, StepEvent

FIXED = model(Path("/nowhere"), ulysses_degree=4)
ELASTIC = FIXED.model_copy(update={"elastic": Elastic()})


def test_who_may_wait_for_a_lost_rank_ends_with_it_and_nobody_else() -> None:
    losses = Losses(8, elastic=True)
    with losses.together({0, 1}), losses.together({2, 3, 4}), losses.together({4, 5}), losses.together({6}):
        assert losses.lose(2, "died") == {2, 3, 4, 5}  # 4 has two requests: it draws one and has the other before it
        assert losses.gone == {2, 3, 4, 5} and losses.living == {0, 1, 6, 7} and not losses.all
        assert losses.lose(5, "killed") == set() and losses.reason == "died"
        assert losses.lose(7, "died as well") == {0, 1, 6, 7}
        assert losses.all and losses.reason == "died as well"
        assert losses.lose(0, "killed") == losses.end() == set()


def test_who_is_done_with_a_request_does_not_end_with_it() -> None:
    losses, together = Losses(4, elastic=True), {0, 1, 2, 3}
    with losses.together(together):
        together -= {1, 2, 3}  # 0 decodes
        with losses.together({2, 3}):
            assert losses.lose(0, "died") == {0}
    assert losses.end() == {1, 2, 3}


def test_all_are_lost_if_all_wait_or_nobody_knows_who_or_the_gang_is_not_elastic() -> None:
    for losses, rank in ((Losses(2, True), None), (Losses(2, False), 1)):
        assert losses.lose(rank, "died") == {0, 1} and losses.all
    losses = Losses(2, elastic=True)
    with losses.together(losses.everyone):
        assert losses.lose(1, "died") == {0, 1} and losses.all


class FakeRank:
    """Reports a step whenever the test says so, until it dies."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.advance = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._advance))
        self.cancel = SimpleNamespace(remote=lambda _: None)

    async def _advance(self, *_: Any) -> AsyncIterator[Any]:
        while (report := await self.told.get()) is not None:
            if isinstance(report, Exception):
                raise report
            told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            told.set_result(report)
            yield told


async def settled() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.mark.parametrize("spec", [ELASTIC, FIXED], ids=["elastic", "fixed"])
@pytest.mark.parametrize("noticed", ["by Ray", "by Ray, which killed it", "by the watch"])
def test_a_request_on_other_ranks_goes_on_in_an_elastic_gang_alone(
    spec: ModelSpec, noticed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr("workers.gang.rank_group.ray.put", lambda value: value)
    monkeypatch.setattr(
        "workers.gang.rank_group.kill_all", lambda ranks, statuses: killed.extend(each.rank for each in statuses)
    )

    async def story() -> None:
        ranks, said = [FakeRank() for _ in range(4)], []
        statuses = [RankStatus(i, 7 + i, "node", "idle", 0, "demo", 1.0, 0) for i in range(4)]
        group = ElasticRankGroup(spec, ranks, statuses, {}, on_lost=said.append)

        async def part(first: int, size: int) -> list[Any]:
            return [each async for each in group.advance(Part(REQUEST, 1, size, b""), first, b"", b"")]

        hit, beside = asyncio.create_task(part(0, 2)), asyncio.create_task(part(2, 2))
        await settled()
        if noticed.startswith("by Ray"):
            ranks[1].told.put_nowait(RayActorError() if noticed == "by Ray" else OutOfMemoryError("on its node"))
        else:
            group._lose("died", "the process of rank 1 is stopped or dead", 1)
            ranks[1].told.put_nowait(RayActorError())
        ranks[0].told.put_nowait(RayActorError())  # who was killed with it
        with pytest.raises(GangLost):
            await hit
        if spec is FIXED:
            assert killed == [0, 1, 2, 3] and group.lost and said == ["died"]
            ranks[2].told.put_nowait(RayActorError())
            with pytest.raises(GangLost):
                await beside
            return
        assert killed == [0, 1] and said == ["died"] and not group.lost
        assert group.gone == {0, 1}
        with pytest.raises(GangLost):
            await part(0, 2)  # dealt before the loss
        ranks[2].told.put_nowait(StepEvent(1, 1, 0.5))
        for rank in ranks[2:]:
            rank.told.put_nowait(None)
        assert await beside == [StepEvent(1, 1, 0.5)]
        await group.end()
        assert killed == [0, 1, 2, 3] and said == ["died"] and group.lost

    asyncio.run(asyncio.wait_for(story(), 120))


def test_a_prompt_whose_caller_has_left_is_still_before_the_others() -> None:
    """Those behind it have a limit for each that is before them, or callers who leave would end a sound rank."""

    async def story() -> None:
        rank, encoded = FakeRank(), asyncio.get_running_loop().create_future()
        rank.encode = SimpleNamespace(remote=lambda _: encoded)  # type: ignore[attr-defined]
        statuses = [RankStatus(0, 7, "node", "idle", 0, "demo", 1.0, 0)]
        group = ElasticRankGroup(ELASTIC, [rank], statuses, {}, on_lost=lambda _: None)
        left, stays = (asyncio.create_task(group.encode(REQUEST)) for _ in range(2))
        await settled()
        left.cancel()
        await settled()
        assert left.cancelled() and group._encoding == 2
        encoded.set_result("prompts")
        await stays
        await settled()
        assert group._encoding == 0

    asyncio.run(asyncio.wait_for(story(), 120))
