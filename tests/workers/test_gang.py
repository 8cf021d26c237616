"""A gang and its requests, without Ray."""

import asyncio

import pytest

from tests.workers.gang_cases import INK, REQUEST, FakeRanks, ask, deploy, gang_with_ink
from workers.errors import UNKNOWN_LORA, InvalidParameter, RequestCancelled
from workers.gang.gang import Gang


@pytest.fixture
def inked(monkeypatch: pytest.MonkeyPatch) -> tuple[Gang, FakeRanks]:
    return gang_with_ink(monkeypatch)


def test_a_gang_says_why_it_lacks_an_adapter(inked: tuple[Gang, FakeRanks]) -> None:
    gang, ranks = inked

    async def story() -> None:
        ranks.finish.set()
        ranks.lost = InvalidParameter("loras", "the model has no adapter 'pencil'", UNKNOWN_LORA)
        with pytest.raises(InvalidParameter, match=r"no adapter 'pencil'$"):
            await ask(gang)
        gang._setup.adapters.want(())
        gang._setup.adapters._refusal = "the adapters cannot be changed: no such file"
        with pytest.raises(InvalidParameter, match="'pencil'; the adapters cannot be changed: no such file") as refused:
            await ask(gang)
        assert refused.value.code == UNKNOWN_LORA
        ranks.lost = InvalidParameter("size", "is odd")
        with pytest.raises(InvalidParameter):
            await ask(gang)

    asyncio.run(story())


def test_a_request_ends_when_its_caller_is_killed(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    gang, ranks = inked
    living = {"SERVE_REPLICA::gateway"}

    def get_actor(name: str, namespace: str) -> None:
        if name not in living:
            raise ValueError(f"no actor {name} in {namespace}")

    monkeypatch.setattr("workers.gang.caller.PERIOD_S", 0.01)
    monkeypatch.setattr("workers.gang.caller.ray.is_initialized", lambda: True)
    monkeypatch.setattr("workers.gang.caller.ray.get_actor", get_actor)

    async def story() -> None:
        running = asyncio.ensure_future(ask(gang, "SERVE_REPLICA::gateway"))
        await asyncio.sleep(0.2)
        assert ranks.cancelled == []
        living.clear()
        with pytest.raises(RequestCancelled):
            await asyncio.wait_for(running, 60)
        assert ranks.cancelled == [REQUEST.request_id]
        assert gang.record_autoscaling_stats()["busy"] == 0

    asyncio.run(story())


def test_a_gang_takes_the_number_that_serve_gives_it(inked: tuple[Gang, FakeRanks]) -> None:
    gang, ranks = inked

    async def story() -> None:
        for number in (2, 1, 1):  # the last time only something else has changed
            await deploy(gang, INK, number=number)
            assert gang._setup.metrics.replica == str(number)
        assert ranks.numbers == ["2", "1"]

    asyncio.run(story())
