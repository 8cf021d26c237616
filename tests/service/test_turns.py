"""Whose turn it is: fair between callers, in order within one, and the right gang."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from service.state import gang_state, shared_turns
from service.state import turns as module
from service.state.tickets import Ticket, Turn
from service.state.turns import Turns
from workers.gang.stats import GangBacklog

SHAPE = (512, 768, 1)


def ticket(name: str, caller: str = "", cost: float = 1.0, place: float = 0.0, asker: str = "") -> Ticket:
    return Ticket(name, caller, cost, place, SHAPE, asker)


def idle(**report: Any) -> GangBacklog:
    return GangBacklog(reported_at=time.time(), **report)


def story(tell: Callable[[Turns], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(tell(Turns()), 60)

    asyncio.run(run())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Served:
    """Requests that wait side by side; which were served, in order, and their turns."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self.turns, self.order = turns, {}, []  # type: ignore[var-annotated]
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def enter(self, *tickets: Ticket) -> None:
        for each in tickets:
            self.tasks[each.request_id] = asyncio.create_task(self._wait(each))
            await settle()

    async def end(self, name: str) -> None:
        self._turns.end(self.turns[name])
        await settle()

    async def run_all(self) -> list[str]:
        """End one after another until nobody waits; return the order."""
        done = 0
        while done < len(self.order):
            await self.end(self.order[done])
            done += 1
        return self.order

    async def _wait(self, each: Ticket) -> None:
        self.turns[each.request_id] = await self._turns.take(each)
        self.order.append(each.request_id)


def test_one_caller_is_served_in_order() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        served = Served(turns)
        await served.enter(*(ticket(name) for name in "vwxyz"))
        assert served.order == ["v"]
        assert len(turns) == 4
        assert await served.run_all() == list("vwxyz")
        assert len(turns) == 0

    story(tell)


def test_an_elastic_gang_is_given_as_many_as_it_takes_and_the_one_with_less_work_first() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("one", {"a": idle(slots=2), "b": idle(slots=2)})
        served = Served(turns)
        await served.enter(*(replace(ticket(name), seconds=10.0) for name in "uvwxy"))
        assert served.order == list("uvwx")
        gangs = [served.turns[name].gang for name in "uvwx"]
        assert sorted(gangs[:2]) == sorted(gangs[2:]) == ["a", "b"]  # never twice to one while the other has less
        await served.end("v")
        assert served.order == list("uvwxy")
        assert served.turns["y"].gang == served.turns["v"].gang
        turns.leave("u")
        assert len(turns._gangs[served.turns["u"].gang].turns) == 1
        turns.forget("one")
        assert not turns._gangs

    story(tell)


def test_within_a_caller_the_order_is_that_of_admission_however_slow_a_gateway_is() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        served = Served(turns)
        first = [ticket(f"m{at}", "many", cost=at, place=at) for at in (1, 3, 5, 7)]
        late = [ticket(f"m{at}", "many", cost=at, place=at) for at in (4, 2, 6)]
        await served.enter(*first, ticket("other", "other", cost=9.0, place=9.0), *late)
        assert [turns._waiting[f"m{at}"].tag for at in range(2, 8)] == [1, 3, 6, 10, 15, 21]  # no gap, no overlap
        assert await served.run_all() == ["m1", "other", "m2", "m3", "m4", "m5", "m6", "m7"]

    story(tell)


def test_who_comes_back_is_not_passed_by_one_that_was_admitted_before() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        served = Served(turns)
        await served.enter(ticket("x", place=5.0), ticket("y", place=6.0))
        turns.end(served.turns["x"], refused=True)
        await served.enter(ticket("x", place=5.0), ticket("w", place=1.0))
        assert sorted(turns._waiting, key=lambda name: turns._waiting[name].tag) == ["x", "w", "y"]

    story(tell)


def test_a_second_caller_waits_for_one_turn_not_for_the_queue() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        served = Served(turns)
        await served.enter(*(ticket(f"many{i}", "many") for i in range(5)), ticket("few", "few"))
        assert (await served.run_all())[:3] == ["many0", "few", "many1"]

    story(tell)


def test_shares_are_by_cost() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        served = Served(turns)
        large = [ticket(f"large{i}", "large", cost=3) for i in range(3)]
        small = [ticket(f"small{i}", "small") for i in range(6)]
        await served.enter(*large, *small)
        order = await served.run_all()
        assert order[:2] == ["large0", "small0"]
        assert order.index("large1") == 4  # three small ones for a large one
        assert order.index("large2") == 8

    story(tell)


def test_who_was_silent_has_saved_nothing() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        served = Served(turns)
        await served.enter(*(ticket(f"first{i}", "first") for i in range(5)))
        for done in range(4):
            await served.end(f"first{done}")
        await served.enter(*(ticket(f"late{i}", "late") for i in range(3)), ticket("first5", "first"))
        order = await served.run_all()
        assert order.index("first5") < order.index("late2")  # not all of the late caller's come first

    story(tell)


def test_a_busy_caller_hardly_delays_a_calm_one() -> None:
    """Ten times the rate of another: the calm caller's 95th percentile stays within twice its wait alone."""

    def waits(busy: bool) -> float:
        """In turns of one gang, simulated: 95 of 100 waits of the calm caller."""
        found: list[int] = []

        async def tell(turns: Turns) -> None:
            turns.know("", {"a": idle()})
            served, source, entered = Served(turns), random.Random(1), {}
            for now in range(400):
                if busy:
                    await served.enter(*(ticket(f"busy{now}-{i}", "busy") for i in range(2)))
                if source.random() < 0.2:
                    name = f"calm{now}"
                    entered[name] = now
                    await served.enter(ticket(name, "calm"))
                if now < len(served.order):
                    await served.end(served.order[now])
                for name in [name for name in entered if name in served.turns]:
                    found.append(now - entered.pop(name))

        story(tell)
        return sorted(found)[int(0.95 * len(found))]

    assert waits(busy=True) <= 2 * max(1.0, waits(busy=False))


def test_what_lost_its_gang_keeps_its_place() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        served = Served(turns)
        await served.enter(*(ticket(name) for name in "xyz"))
        turns.lose("x")
        await served.end("x")
        assert served.order == ["x", "y"]  # the only gang, although it replaces its ranks
        await served.enter(ticket("x"))
        assert await served.run_all() == ["x", "y", "x", "z"]

    story(tell)


def test_a_gang_that_replaces_its_ranks_takes_nothing_while_others_run() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"lost": idle(replacing=True), "busy": idle()})
        served = Served(turns)
        await served.enter(ticket("x"), ticket("y"))
        assert (served.order, served.turns["x"].gang) == (["x"], "busy")
        turns.know("", {"lost": idle(), "busy": idle(busy=True)})
        await settle()
        assert served.turns["y"].gang == "lost"

    story(tell)


def test_a_loss_counts_before_the_gang_reports_it() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        served = Served(turns)
        await served.enter(ticket("x"))
        turns.know("", {"a": idle(), "b": GangBacklog(90.0, time.time())})
        turns.lose("x")
        await served.end("x")
        await served.enter(ticket("x again"))
        assert served.turns["x again"].gang == "b"

    story(tell)


def test_a_gang_that_refuses_is_asked_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_state, "REFUSED_S", 0.05)

    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        first = await turns.take(ticket("x"))
        turns.end(first, refused=True)
        began = time.monotonic()
        served = Served(turns)
        await served.enter(ticket("y"), ticket("x"))
        assert served.order == []
        await asyncio.wait(served.tasks.values(), timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert time.monotonic() - began >= 0.05
        assert served.order == ["x"]  # it keeps its place

    story(tell)


def test_whoever_leaves_waits_no_more_and_holds_nothing() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        served = Served(turns)
        await served.enter(ticket("x"), ticket("y"), ticket("z"))
        served.tasks["y"].cancel()
        await settle()
        assert len(turns) == 1
        assert await served.run_all() == ["x", "z"]
        await served.enter(ticket("v"), ticket("w"))
        turns.end(served.turns["v"])  # the turn of w has come, it does not know yet
        served.tasks["w"].cancel()
        await settle()
        assert "w" not in served.turns
        await asyncio.wait_for(turns.take(ticket("u")), 10)

    story(tell)


def test_a_gang_that_says_it_is_idle_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the end of a request get lost, the gang would else be held for ever."""

    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        turn = await turns.take(ticket("x"))
        monkeypatch.setattr(module, "OVERDUE_S", 0.02)
        await asyncio.sleep(0.05)
        turns.know("", {"a": idle(busy=True)})
        waiting = asyncio.create_task(turns.take(ticket("y")))
        await settle()
        assert not waiting.done()
        turns.know("", {"a": idle()})
        monkeypatch.undo()
        after = await asyncio.wait_for(waiting, 10)
        turns.end(turn)  # too late: it is another's
        third = asyncio.create_task(turns.take(ticket("z")))
        await settle()
        assert not third.done()
        turns.end(after)
        await asyncio.wait_for(third, 10)

    story(tell)


def test_an_older_report_changes_nothing() -> None:
    async def tell(turns: Turns) -> None:
        now = time.time()
        turns.know("one", {"a": GangBacklog(90.0, now), "b": GangBacklog(20.0, now)})
        turns.know("two", {"a": GangBacklog(0.0, now - 5), "b": GangBacklog(20.0, now)})
        assert (await turns.take(ticket("x"))).gang == "b"

    story(tell)


def test_what_has_just_ended_counts_before_the_gang_reports_it() -> None:
    async def tell(turns: Turns) -> None:
        before = GangBacklog(90.0, time.time() - 0.1, busy=True)
        turns.know("", {"a": before})
        turns.end(await turns.take(ticket("x")))
        turns.know("", {"a": before, "b": GangBacklog(20.0, time.time())})
        assert (await turns.take(ticket("y"))).gang == "a"

    story(tell)


def test_a_call_that_is_canceled_takes_no_other_of_its_request_along() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        await turns.take(ticket("x"))
        first = asyncio.create_task(turns.take(ticket("y")))
        await settle()
        turns.leave("y")
        second = asyncio.create_task(turns.take(ticket("y")))
        await settle()
        assert first.cancelled()
        assert not second.done() and len(turns) == 1
        second.cancel()

    story(tell)


def test_a_gateway_that_is_gone_holds_nothing() -> None:
    async def tell(turns: Turns) -> None:
        for asker in ("one", "two"):
            turns.know(asker, {"a": idle()})
        await turns.take(ticket("x", asker="one"))
        dead = asyncio.create_task(turns.take(ticket("y", asker="one")))
        alive = asyncio.create_task(turns.take(ticket("z", asker="two")))
        await settle()
        turns.forget("one")
        assert (await asyncio.wait_for(alive, 10)).gang == "a"
        assert dead.cancelled()

    story(tell)


def test_a_gang_that_nobody_knows_is_gone() -> None:
    async def tell(turns: Turns) -> None:
        for asker in ("one", "two"):
            turns.know(asker, {"a": idle()})
        turns.know("one", {})
        turn = await asyncio.wait_for(turns.take(ticket("x")), 10)
        turns.know("two", {})
        turns.end(turn)
        waiting = asyncio.create_task(turns.take(ticket("y")))
        await settle()
        assert not waiting.done()
        turns.know("two", {"b": idle()})
        assert (await asyncio.wait_for(waiting, 10)).gang == "b"

    story(tell)


def test_tags_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 10)

    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        for number in range(50):
            turns.end(await turns.take(ticket(str(number), f"caller {number}")))
        assert len(turns._tags) <= 11
        assert not turns._ends

    story(tell)


def test_what_a_new_request_would_wait_for() -> None:
    async def tell(turns: Turns) -> None:
        assert turns.prospect("") == (0, 0.0)  # nothing is known
        turns.know("", {name: idle(request_s=10.0) for name in "ab"})
        assert turns.prospect("") == (0, 0.0)  # a gang is free
        served = Served(turns)
        who = [(f"{caller}{i}", caller) for i in range(4) for caller in ("one", "two")]
        await served.enter(*(ticket(*each, place=place) for place, each in enumerate(who)))
        ahead, wait_s = turns.prospect("one")
        assert (ahead, wait_s) == (6, pytest.approx((6 * 10 + 2 * 10) / 2, abs=1))
        assert turns.prospect("three").ahead == 0  # both others have had a turn
        assert turns.standing("one0") is None  # it has its turn
        assert [turns.standing(f"{caller}1") for caller in ("one", "two")] == [
            (0, pytest.approx(10, abs=1)),
            (1, pytest.approx(15, abs=1)),
        ]
        turns.know("", {name: GangBacklog(5.0, time.time(), 10.0, busy=True) for name in "ab"})
        assert turns.prospect("one").wait_s == pytest.approx((6 * 10 + 2 * 5) / 2, abs=1)

    story(tell)


def test_an_elastic_gang_that_is_full_takes_the_next_when_one_of_its_own_ends() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle(slots=4)})
        served = Served(turns)
        await served.enter(*(ticket(name) for name in "wxyz"))
        turns.know("", {"a": GangBacklog(40.0, time.time() + 1, 10.0, busy=True, slots=4)})
        assert turns.prospect("") == (0, pytest.approx(10, abs=1))
        await served.enter(ticket("waits"))
        assert turns.prospect("") == (1, pytest.approx(20, abs=1))

    story(tell)


def test_the_prospect_is_of_what_waits_not_of_so_many() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle(request_s=10.0)})
        served = Served(turns)
        long, short = (replace(ticket(name), seconds=seconds) for name, seconds in (("long", 100.0), ("short", 1.0)))
        await served.enter(replace(ticket("running"), seconds=40.0), long, short, ticket("unknown"))
        assert served.order == ["running"]
        assert turns.prospect("") == (3, pytest.approx(40 + 100 + 1 + 10, abs=1))
        assert [turns.standing(name) for name in ("long", "short", "unknown")] == [
            (0, pytest.approx(40, abs=1)),
            (1, pytest.approx(140, abs=1)),
            (2, pytest.approx(141, abs=1)),
        ]

    story(tell)


def test_a_turn_is_one_gang_and_one_number() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"a": idle()})
        turn = await turns.take(ticket("x"))
        turns.end(Turn(turn.number + 1, "a"))
        waiting = asyncio.create_task(turns.take(ticket("y")))
        await settle()
        assert not waiting.done()
        waiting.cancel()

    story(tell)


def test_the_keeper_of_shared_turns_runs_on_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it would keep a node of GPUs from being removed."""
    options: dict[str, Any] = {}

    class Made:
        def options(self, **given: Any) -> "Made":
            options.update(given)
            return self

        def remote(self) -> None:
            pass

    monkeypatch.setattr("service.state.shared_turns.ray.remote", lambda _: Made())
    shared_turns.start_keeper()
    assert options["resources"].keys() == {"node:__internal_head__"}
    assert options["num_cpus"] == 0
