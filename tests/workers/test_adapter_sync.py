"""Ranks get the adapters of the deployment file, however often it changes, and whatever they refuse."""

import asyncio

import pytest

from tests.workers.gang_cases import CHALK, INK, FakeRanks, ask, deploy, gang_with_ink, settled
from workers.gang.gang import Gang


@pytest.fixture
def inked(monkeypatch: pytest.MonkeyPatch) -> tuple[Gang, FakeRanks]:
    return gang_with_ink(monkeypatch)


def test_adapters_follow_the_file_however_often_it_changes_during_a_request(inked: tuple[Gang, FakeRanks]) -> None:
    gang, ranks = inked

    async def story() -> None:
        running = asyncio.ensure_future(ask(gang))
        await settled(gang)
        await deploy(gang)
        assert await settled(gang) == "the adapters change to none after the running request"
        await deploy(gang, INK)
        assert await settled(gang) == ""
        await deploy(gang, CHALK)
        await deploy(gang, INK)
        ranks.finish.set()
        await running
        assert await settled(gang) == ""
        assert ranks.loras == (INK,)
        await deploy(gang, INK, CHALK)
        assert await settled(gang) == ""
        assert ranks.loras == (INK, CHALK)

    asyncio.run(story())


def test_a_refusal_ends_with_its_cause(inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch) -> None:
    gang, ranks = inked
    ranks.refused = {CHALK}
    monkeypatch.setattr("workers.gang.adapter_sync.AGAIN_S", 0.05)

    async def story() -> None:
        await deploy(gang, INK, CHALK)
        assert await settled(gang) == "the adapters cannot be changed: no such file"
        assert ranks.loras == (INK,)
        await deploy(gang, INK)
        assert await settled(gang) == ""
        await deploy(gang, CHALK)
        assert "cannot be changed" in await settled(gang)
        ranks.refused = set()  # the file is there now
        async with asyncio.timeout(60):
            while ranks.loras != (CHALK,):
                await asyncio.sleep(0.01)
        assert await settled(gang) == ""

    asyncio.run(story())
