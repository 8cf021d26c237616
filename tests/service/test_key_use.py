"""The limits of a key hold over all gateways, a second late; a gateway that is alone counts for itself."""

import asyncio
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from deploy.api_keys import ApiKey, digest
from service.state import key_use
from service.state.key_use import KeyUses, SharedUse, Use
from service.state.keyring import Allowance, Keyring
from workers.errors import RateLimited

PER_MINUTE = 600.0
KEY = ApiKey(name="a", sha256=digest("a"), max_concurrent=2, max_work_per_minute=PER_MINUTE)


def test_the_keeper_adds_up_what_others_have_told_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("service.state.key_use.time.monotonic", lambda: now[0])
    uses = KeyUses()

    async def story() -> None:
        assert await uses.share_use("one", {"a": Use(1, 5.0)}) == {}
        assert await uses.share_use("two", {"a": Use(2, 7.0), "b": Use(1, 0.0)}) == {"a": (1, 5.0)}
        assert await uses.share_use("three", {}) == {"a": (3, 12.0), "b": (1, 0.0)}
        assert await uses.share_use("one", {}) == {"a": (2, 7.0), "b": (1, 0.0)}
        now[0] += key_use.SILENT_S + 1
        assert await uses.share_use("two", {}) == {}
        assert uses._told.keys() == {"two"}

    asyncio.run(story())


def test_requests_elsewhere_count() -> None:
    allowance = Allowance()
    allowance.elsewhere = Use(running=1)
    with allowance.take(KEY, 1):
        assert allowance.used == (1, pytest.approx(1, abs=0.5))
        with pytest.raises(RateLimited, match="'a' has 2 requests that wait or run, at most 2"):
            allowance.take(KEY, 1).__enter__()
    allowance.elsewhere = Use(spent=PER_MINUTE - 1)
    with pytest.raises(RateLimited, match="has used its work of this minute"):
        allowance.take(KEY, 5).__enter__()


@pytest.mark.parametrize("shared", [True, False])
def test_all_gateways_have_one_bucket(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Three gateways under more load than the key may: ten minutes bring ten minutes' work, not thirty."""
    now, minutes = [time.monotonic()], 10
    monkeypatch.setattr("service.state.keyring.time.monotonic", lambda: now[0])
    gateways = [Allowance() for _ in range(3)]
    done = [0.0] * 3
    for tick in range(600 * minutes):
        now[0] += 0.1
        for number, gateway in enumerate(gateways):
            try:
                with gateway.take(KEY, 10.0):
                    done[number] += 10.0
            except RateLimited:
                pass
        if shared and tick % 10 == 0:
            used = [gateway.used for gateway in gateways]
            for number, gateway in enumerate(gateways):
                gateway.elsewhere = Use(0, sum(use.spent for use in used) - used[number].spent)
    most = PER_MINUTE * (minutes + 1) + 3 * 10 * 10.0  # a full bucket at first, and what all take within a second
    assert (PER_MINUTE * minutes < sum(done) <= most) is shared
    assert not shared or min(done) > 0


def test_a_gateway_tells_and_hears_and_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_use, "PERIOD_S", 0.01)
    ring = Keyring()
    told: list[tuple[str, Mapping[str, Use]]] = []
    answers: list[Any] = [{"a": Use(1, 5.0)}, ActorUnavailableError("it is away", b"0" * 16), {"b": Use(2, 0.0)}]

    def remote(gateway: str, used: Mapping[str, Use]) -> Any:
        told.append((gateway, used))
        answer = asyncio.get_running_loop().create_future()
        if answers:
            found = answers.pop(0)
            answer.set_exception(found) if isinstance(found, Exception) else answer.set_result(found)
        return answer

    heard: list[Mapping[str, Use]] = []

    def hear(others: Mapping[str, Use]) -> None:
        heard.append(others)
        ring.hear(others)

    async def story() -> None:
        keeper = SimpleNamespace(share_use=SimpleNamespace(remote=remote))
        ours = SharedUse("one", lambda: ring.limited, ring.used, hear, lambda: keeper)
        ours.follow(True)
        for _ in range(10):
            await asyncio.sleep(0.01)
        assert not told, "no key has a limit"
        ring._from_file = (KEY,)
        with ring.allowance(KEY).take(KEY, 3.0):
            async with asyncio.timeout(60):
                while len(heard) < 3:
                    await asyncio.sleep(0.01)
        ours.follow(False)
        assert ours._sharing is not None
        ours._sharing.cancel()

    asyncio.run(story())
    assert heard == [{"a": (1, 5.0)}, {}, {"b": (2, 0.0)}]
    assert [name for name, _ in told[:3]] == ["one"] * 3
    assert told[0][1]["a"] == (1, pytest.approx(3.0, abs=0.5))
    assert ring.allowance(KEY).elsewhere == (0, 0.0)
    assert ring._allowances["b"].elsewhere == (2, 0.0)
