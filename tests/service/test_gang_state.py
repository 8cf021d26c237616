"""What is known of a gang: when it is asked again, and which of several gets a request."""

import time

from service.state.gang_state import GangState, best
from service.state.turns import Turns
from tests.service.test_turns import idle, story, ticket
from workers.gang.stats import GangBacklog


def test_a_gang_that_reports_work_is_asked_again_later() -> None:
    state = GangState(report=GangBacklog(30.0, time.time()), refused_at=time.time())
    now = state.refused_at
    assert [state.pauses(now + later) for later in (0.05, 0.9, 1.1)] == [True, True, False]
    state.report = idle()
    assert [state.pauses(now + later) for later in (0.05, 0.2)] == [True, False]


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
