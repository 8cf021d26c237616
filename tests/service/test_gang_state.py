"""What is known of a gang: when it is asked again, and which of several gets a request."""

import asyncio
import time

import pytest

from service.state import gang_state
from service.state.gang_state import MOST_AGE_S, GangState, best
from service.state.turns import Turns
from tests.service.test_turns import idle, story, ticket
from workers.gang.stats import GangBacklog


def test_a_gang_that_reports_work_is_asked_again_later() -> None:
    now = time.monotonic()
    state = GangState(report=GangBacklog(30.0, time.time()), reported_at=now, refused_at=now)
    assert [state.pauses(now + later) for later in (0.05, 0.9, 1.1)] == [True, True, False]
    state.report = idle()
    assert [state.pauses(now + later) for later in (0.05, 0.2)] == [True, False]


def test_a_clock_that_is_set_back_keeps_no_gang_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def tell(turns: Turns) -> None:
        turns.know("one", {"a": idle(replacing=True), "b": idle()})
        turns.know("two", {"a": idle(replacing=True), "b": idle()})
        refused = await turns.take(ticket("x"))
        clock = time.time() - 3600
        with monkeypatch.context() as patch:
            patch.setattr(gang_state.time, "time", lambda: clock)  # type: ignore[attr-defined]
            turns.end(refused, refused=True)
            again = asyncio.create_task(turns.take(ticket("x")))
            assert (await asyncio.wait_for(again, 5)).gang == "b"  # it was asked again after a moment
            turns.know("one", {"a": GangBacklog(reported_at=clock), "b": GangBacklog(reported_at=clock, busy=True)})
            assert (await asyncio.wait_for(turns.take(ticket("y")), 5)).gang == "a"  # it has its ranks again

    story(tell)


def test_of_two_gateways_the_one_with_the_older_report_changes_nothing_when_it_repeats_it() -> None:
    state, now = GangState(), time.time()
    old, new = GangBacklog(9.0, now - 60), GangBacklog(1.0, now)
    for asker, report in (("one", old), ("two", new), ("one", old), ("one", GangBacklog(8.0, now - 30))):
        state.hear(asker, report)
    assert state.report == new
    state.hear("two", GangBacklog(reported_at=0.0))  # Serve has none
    assert state.report == new
    state.hear("one", reset := GangBacklog(3.0, now - 100))
    assert state.report == reset
    assert 0 <= time.monotonic() - state.reported_at <= MOST_AGE_S + 1


def test_a_gang_whose_clock_is_slow_is_not_lost_for_long() -> None:
    state = GangState(lost_at=time.monotonic() - MOST_AGE_S - 1)
    assert state.lost
    state.hear("one", GangBacklog(reported_at=time.time() - 3600))
    assert not state.lost


def test_the_gang_with_the_least_backlog_and_among_equals_a_warm_one() -> None:
    assert best(list("abc"), {"a": 300.0, "b": 5.0, "c": 90.0}, frozenset("a")) == "b"
    assert best(list("abc"), {"a": 0.0, "b": 1.0, "c": 30.0}, frozenset("bc")) == "b"
    assert best(list("ab"), {"a": 1.0, "b": 1.0}, frozenset()) == "a"


def test_a_busy_gang_of_unknown_work_comes_last() -> None:
    async def tell(turns: Turns) -> None:
        turns.know("", {"busy": GangBacklog(90.0, time.time()), "new": GangBacklog()})
        assert (await turns.take(ticket("x"))).gang == "new"
        assert (await turns.take(ticket("y"))).gang == "busy"  # it may be free by now: it has the last word

    story(tell)
