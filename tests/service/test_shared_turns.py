"""One keeper for several gateways: a real actor, which is killed; and gateways that fall silent. The same of the actor
that keeps the answers of idempotency keys."""

import ast
import asyncio
import functools
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from deploy.storage_spec import Idempotency
from service.rollout.cluster_folder import place
from service.state import shared_turns
from service.state.exchange import Colleagues, Question
from service.state.idempotency import IdempotencyKeys
from service.state.kept_answers import Claim
from service.state.key_use import SharedUse, Use
from service.state.shared_turns import SharedTurns, start_keeper
from tests.service.test_once import RESULT
from tests.service.test_turns import idle, settle, ticket

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="ray-", dir=place())
    ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_turns, "_several", True)
    monkeypatch.setattr(shared_turns, "BEAT_S", 0.2)
    monkeypatch.setattr(shared_turns, "SILENT_S", 20.0)


async def connected(*gateways: SharedTurns) -> None:
    for gateway in gateways:
        gateway.know({"a": idle()})
    async with asyncio.timeout(60):
        while not all(gateway._keeper for gateway in gateways):
            await asyncio.sleep(0.01)


def story(application: str, tell: Callable[[SharedTurns, SharedTurns], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        gateways = SharedTurns(application), SharedTurns(application)
        await connected(*gateways)
        await asyncio.wait_for(tell(*gateways), 60)
        for gateway in gateways:
            assert gateway._beating is not None
            gateway._beating.cancel()

    asyncio.run(run())


def test_two_gateways_take_turns_on_one_gang() -> None:
    async def tell(one: SharedTurns, two: SharedTurns) -> None:
        first = await one.take(ticket("x"))
        second, third = asyncio.create_task(two.take(ticket("y"))), asyncio.create_task(one.take(ticket("z")))
        while await one.standing("z") is None:
            await asyncio.sleep(0.01)
        assert not second.done() and not third.done()
        standing = [await one.standing(name) for name in "xyz"]
        assert standing == [None, (0, 0.0), (1, 0.0)]  # nobody knows what one costs
        assert (await two.prospect("another")).ahead == 0
        one.end(first)
        two.end(await second)
        one.end(await third)

    story("in turn", tell)


def test_who_leaves_in_one_gateway_does_not_hold_up_the_other() -> None:
    async def tell(one: SharedTurns, two: SharedTurns) -> None:
        first = await one.take(ticket("x"))
        leaving, staying = asyncio.create_task(one.take(ticket("y"))), asyncio.create_task(two.take(ticket("z")))
        await asyncio.sleep(0.3)
        leaving.cancel()
        await settle()
        one.end(first)
        two.end(await staying)

    story("leaving", tell)


def test_a_gateway_that_falls_silent_holds_nothing() -> None:
    async def tell(one: SharedTurns, two: SharedTurns) -> None:
        keeper = start_keeper()
        await keeper.beat.remote("silent", "dead", {"a": idle()})
        await keeper.take.remote("silent", ticket("x", asker="dead"))
        waiting = asyncio.create_task(two.take(ticket("y")))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        assert await asyncio.wait_for(waiting, 30)  # the keeper's own limit: `SILENT_S` is changed in this process only

    story("silent", tell)


def test_without_a_keeper_each_goes_on_by_itself_and_then_they_meet_again() -> None:
    async def tell(one: SharedTurns, two: SharedTurns) -> None:
        held = await one.take(ticket("x"))
        waiting = asyncio.create_task(two.take(ticket("y")))
        await asyncio.sleep(0.3)
        ray.kill(start_keeper(), no_restart=False)
        turn = await asyncio.wait_for(waiting, 30)  # its own: the gang will refuse it
        two.end(turn, refused=True)
        assert turn not in two._shared
        one.end(held)
        while one._keeper is not None:
            await asyncio.sleep(0.01)
        await connected(one, two)
        last = await one.take(ticket("z"))
        assert last in one._shared
        one.end(last)

    story("killed", tell)


def test_a_turn_that_ends_while_the_keeper_is_away_ends_there_too() -> None:
    """The gang always reports itself busy, so nobody else would notice."""

    async def tell(one: SharedTurns, two: SharedTurns) -> None:
        first = await one.take(ticket("x"))
        second = asyncio.create_task(two.take(ticket("y")))
        while await two.standing("y") is None:
            await asyncio.sleep(0.01)
        one._lose_keeper(TimeoutError("one look took long"))
        one.end(first)
        await asyncio.wait_for(second, 20)

    story("slow", tell)


def test_the_keeper_passes_on_questions_also_when_it_was_killed() -> None:
    async def run() -> None:
        async def answer_of(name: str, question: Question) -> tuple[str, Question]:
            return name, question

        gateways = [Colleagues(name, functools.partial(answer_of, name), start_keeper) for name in "ab"]
        for gateway in gateways:
            gateway.follow(True)
        question = ("told", (None,))
        wanted = ([("a", question), ("b", question)], [])
        for _ in range(2):
            async with asyncio.timeout(60):
                while await gateways[0].ask(question) != wanted:
                    await asyncio.sleep(0.05)
            ray.kill(start_keeper(), no_restart=False)
        for gateway in gateways:
            gateway.follow(False)
            assert gateway._attending is not None
            gateway._attending.cancel()

    asyncio.run(run())


def test_the_answers_of_keys_outlive_their_actor(tmp_path: Path) -> None:
    """Two gateways, of which none lives, so the second takes over what the first has not ended."""
    settings = Idempotency(folder=str(tmp_path)).model_dump()

    async def run() -> None:
        one, two = IdempotencyKeys("dead"), IdempotencyKeys("dead, too")
        for gateway in (one, two):
            gateway.follow(settings)
        assert (await one.claim("k", "f", 3, "1", 0.0)).state == "mine"
        assert (await one.claim("k", "f", 3, "1", 0.0)).state == "mine"  # the call came twice
        assert await one.finish("k", "1", RESULT, "png")
        assert (await one.claim("l", "f", 4, "2", 0.0)).state == "mine"
        ray.kill(one._start())
        assert await two.claim("k", "f", 9, "3", 0.0) == Claim("done", 3, RESULT)
        assert await two.claim("l", "f", 9, "4", 30.0) == Claim("mine", 4)
        assert not await one.finish("l", "2", RESULT, "png")
        assert (await one.claim("k", "another", 9, "5", 0.0)).state == "reused"

    asyncio.run(run())


def test_one_gateway_needs_no_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_turns, "_several", False)

    async def tell() -> None:
        alone = SharedTurns("alone")
        alone.know({"a": idle()})
        alone.end(await alone.take(ticket("x")))
        assert alone._beating is None

    asyncio.run(tell())


def test_a_model_that_is_removed_is_no_longer_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its router goes, and with it what it beat for."""
    keeper = start_keeper()

    async def run() -> None:
        going, staying = SharedTurns("removed"), SharedTurns("removed")
        await connected(going, staying)
        gone, beating = weakref.ref(going), going._beating
        del going
        async with asyncio.timeout(30):
            assert beating is not None
            await beating
        assert gone() is None
        assert staying._beating is not None and not staying._beating.done()
        staying._beating.cancel()

    asyncio.run(run())
    ray.get(keeper.beat.remote("removed", "other", {}), timeout=60)  # the keeper is none the worse


def test_who_loses_ranks_tells_all_gateways() -> None:
    async def tell(one: SharedTurns, two: SharedTurns) -> None:
        for gateway in (one, two):
            gateway.know({"a": idle(), "b": idle()})
        first = await one.take(ticket("x"))
        assert first in one._shared
        one.lose("x")
        one.end(first)
        other = "b" if first.gang == "a" else "a"
        for name in "yz":  # the keeper gives nobody the gang that has lost its ranks
            turn = await two.take(ticket(name))
            assert (turn in two._shared, turn.gang) == (True, other)
            two.end(turn)
        for gateway in (one, two):
            gateway.know({"a": idle(), "b": idle()})  # it has new ones, and says so
        held = await two.take(ticket("v"))
        assert {held.gang, (await two.take(ticket("w"))).gang} == {"a", "b"}

    story("losing", tell)


def test_the_keeper_hears_at_once_of_gangs_that_come_go_or_lose_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else they report comes with the beat: each gang reports every second, to each gateway."""
    monkeypatch.setattr(shared_turns, "BEAT_S", 600.0)

    async def tell(one: SharedTurns, two: SharedTurns) -> None:
        beaten: list[Any] = []
        keeper = SimpleNamespace(beat=SimpleNamespace(remote=lambda *told: beaten.append(told[2])))
        one._keeper = keeper
        for reports in (
            {"a": idle()},  # as before
            {"a": idle(busy=True)},
            {"a": idle(), "b": idle()},
            {"a": idle(), "b": idle(replacing=True)},
            {"a": idle(), "b": idle(replacing=True, request_s=2.0)},
            {"a": idle()},
        ):
            one.know(reports)
            assert one._reports == reports
        assert [[*told] for told in beaten] == [["a", "b"], ["a", "b"], ["a"]]

    story("news", tell)


def test_the_keeper_tells_each_gateway_what_keys_use_at_the_others() -> None:
    heard: dict[str, Any] = {}

    async def run() -> None:
        used = {name: {"web": Use(number, 10.0 * number)} for number, name in enumerate("abc")}
        gateways = [
            SharedUse(
                name,
                lambda: True,
                lambda name=name: used[name],
                functools.partial(heard.__setitem__, name),
                start_keeper,
            )  # type: ignore[misc]
            for name in "abc"
        ]
        for gateway in gateways:
            gateway.follow(True)
        async with asyncio.timeout(60):
            while heard != {"a": {"web": (3, 30.0)}, "b": {"web": (2, 20.0)}, "c": {"web": (1, 10.0)}}:
                await asyncio.sleep(0.05)
        for gateway in gateways:
            assert gateway._sharing is not None
            gateway._sharing.cancel()

    asyncio.run(run())


def test_routers_of_several_models_may_start_the_keeper_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each does so in a thread of its own, and Python parses in one thread only."""

    def parse(*_: Any, **__: Any) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", parse)
        one, two = start_keeper(), start_keeper()
    assert one._actor_id == two._actor_id


def hurry(keeper: Any) -> int:
    """In the keeper's process, whose id is returned: it knows no gateway that lives, and waits for none."""
    module = sys.modules[type(keeper).__module__]
    for name in ("BEAT_S", "PERIOD_S"):
        setattr(module, name, 0.05)
    module.SILENT_S, module.FORGOTTEN_S, module.UNUSED_S = 0.2, 0.2, 0.5  # type: ignore[attr-defined]
    return os.getpid()


def ends(pid: int) -> bool:
    """Whether a process ends by itself: it is asked nothing."""
    until = time.monotonic() + 60
    while time.monotonic() < until and Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def test_the_keeper_ends_when_nobody_asks_and_another_takes_its_place() -> None:
    keeper = start_keeper()
    ray.get(keeper.beat.remote("m", "one", {}), timeout=60)
    assert ends(ray.get(keeper.__ray_call__.remote(hurry), timeout=60))
    with pytest.raises(RayActorError):
        ray.get(keeper.prospect.remote("m", ""), timeout=60)
    another = start_keeper()
    assert another._actor_id != keeper._actor_id
    assert ray.get(another.prospect.remote("m", ""), timeout=60) == (0, 0.0)


def test_the_actor_of_answers_ends_when_nobody_asks_and_another_reads_its_file(tmp_path: Path) -> None:
    async def run() -> None:
        keys = IdempotencyKeys("a")
        keys.follow(Idempotency(folder=str(tmp_path)).model_dump())
        keeper = keys._start()
        pid = await keeper.__ray_call__.remote(hurry)  # before its first call, which starts what it waits in
        assert (await keys.claim("k", "f", 3, "1", 0.0)).state == "mine"
        assert await keys.finish("k", "1", RESULT, "png")
        assert await asyncio.to_thread(ends, pid)
        assert await keys.claim("k", "f", 9, "2", 0.0) == Claim("done", 3, RESULT)

    asyncio.run(run())


def test_the_keeper_stays_while_somebody_asks() -> None:
    keeper = start_keeper()
    ray.get(keeper.__ray_call__.remote(hurry), timeout=60)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        ray.get(keeper.beat.remote("m", "one", {}), timeout=60)
    ray.kill(keeper)
