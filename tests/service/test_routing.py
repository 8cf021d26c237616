"""The router: least backlog in seconds first, a warm gang among equals, corrected by what it sent itself."""

import asyncio
import time
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from service.routing import OFFERED, LeastBacklogRouter, Sent, backlog_s, tiers
from service.state.waiting import Waiting, waiting_for
from workers.gang.stats import GangBacklog
from workers.messages import GenerationRequest

REQUEST = GenerationRequest("r", "m", "a cup", 512, 768, 10, seed=1)
SHAPE = (512, 768, 1)


def router() -> LeastBacklogRouter:
    """Without what Serve's constructor connects to."""
    made = LeastBacklogRouter.__new__(LeastBacklogRouter)
    made._deployment_id = DeploymentID("Gang", app_name="model-m")
    made.initialize_state()
    return made


def replica(name: str, backlog_s: float = 0.0, shapes: frozenset[Any] = frozenset()) -> Any:
    stats = GangBacklog(backlog_s, time.time() - 1, 20.0, shapes).as_stats()
    return SimpleNamespace(replica_id=name, routing_stats=stats)


def pending(*args: Any, request_id: str = "a") -> Any:
    context = SimpleNamespace(should_backoff=False)
    return SimpleNamespace(
        args=list(args), routing_context=context, metadata=SimpleNamespace(internal_request_id=request_id)
    )


def chosen(router: LeastBacklogRouter, replicas: list[Any], request: Any) -> list[list[str]]:
    ranks = asyncio.run(router.choose_replicas(replicas, request))
    return [[str(replica.replica_id) for replica in some] for some in ranks]


def test_the_least_backlog_leads() -> None:
    backlogs = {"a": 300.0, "b": 5.0, "c": 90.0}
    assert tiers(list(backlogs), backlogs, frozenset()) == [["b"], ["c", "a"]]


def test_a_warm_gang_leads_among_comparable_ones_only() -> None:
    backlogs = {"a": 0.0, "b": 1.0, "c": 30.0}
    assert tiers(list(backlogs), backlogs, frozenset("bc")) == [["b"], ["a"], ["c"]]


def test_equals_keep_their_order_and_ranks_stay_small() -> None:
    backlogs = {str(number): 0.0 for number in range(100)}
    assert tiers(list(backlogs), backlogs, frozenset()) == [list(backlogs)[:OFFERED]]
    assert tiers([], {}, frozenset()) == []


@pytest.mark.parametrize(
    ("report", "sent", "seconds"),
    [
        (GangBacklog(), Sent(), 0.0),  # nothing is known of it
        (GangBacklog(50, 95, 20), Sent(), 45.0),  # five seconds have passed since the report
        (GangBacklog(0, 95, 20), Sent("a", sent_at=98), 18.0),  # sent after the report
        (GangBacklog(30, 95, 20), Sent("a", sent_at=90), 25.0),  # the report knows of it
        (GangBacklog(30, 95, 20), Sent(freed_at=98), 0.0),  # done after the report
        (GangBacklog(0, 95, 0), Sent("a", sent_at=98), 58.0),  # cost not learned
    ],
)
def test_reports_are_corrected_by_what_was_sent_since(report: GangBacklog, sent: Sent, seconds: float) -> None:
    assert backlog_s(report, sent, now=100.0) == pytest.approx(seconds)


def test_a_request_that_takes_longer_than_typical_still_occupies_its_gang() -> None:
    late = backlog_s(GangBacklog(0, 10, 20), Sent("a", sent_at=11), now=500.0)
    assert tiers(["late", "free"], {"late": late, "free": 0.0}, frozenset(["late"])) == [["free"], ["late"]]


def test_reports_survive_the_way_through_serve() -> None:
    report = GangBacklog(3.0, 4.0, 5.0, frozenset([SHAPE]))
    assert GangBacklog.from_stats(report.as_stats()) == report
    assert GangBacklog.from_stats({}) == GangBacklog()
    assert GangBacklog.from_stats({**report.as_stats(), "of_a_later_version": 1}) == report


def test_requests_go_to_the_warm_free_gang() -> None:
    gangs = [replica("cold"), replica("warm", shapes=frozenset([SHAPE])), replica("busy", 90.0)]
    request = pending(REQUEST)
    assert chosen(router(), gangs, request) == [["warm"], ["cold"], ["busy"]]
    assert request.routing_context.should_backoff  # without it Serve asks again and again without a pause


def test_what_it_sent_counts_until_it_is_done() -> None:
    ours, gangs = router(), [replica("a"), replica("b", 10.0)]
    ours.on_request_routed(pending(REQUEST, request_id="first"), "a", None)  # type: ignore[arg-type]
    assert chosen(ours, gangs, pending(REQUEST)) == [["b"], ["a"]]
    ours.on_request_completed("a", "refused")  # type: ignore[arg-type]  # of another request
    assert chosen(ours, gangs, pending(REQUEST)) == [["b"], ["a"]]
    ours.on_request_completed("a", "first")  # type: ignore[arg-type]
    assert chosen(ours, gangs, pending(REQUEST)) == [["a"], ["b"]]


def test_calls_that_are_no_generation_fit_any_gang_and_cost_nothing() -> None:
    ours, gangs = router(), [replica("a"), replica("b", 10.0)]
    for call in (pending(), pending("x"), None):
        assert chosen(ours, gangs, call) == [["a"], ["b"]]
    ours.on_request_routed(pending(), "a", None)  # type: ignore[arg-type]
    assert chosen(ours, gangs, pending(REQUEST)) == [["a"], ["b"]]


def test_gangs_that_never_reported_are_taken_for_free() -> None:
    new = SimpleNamespace(replica_id="new", routing_stats={})
    assert chosen(router(), [replica("busy", 50.0), new], pending(REQUEST)) == [["new"], ["busy"]]


def test_gangs_that_are_gone_are_forgotten() -> None:
    ours = router()
    for name in "abc":
        ours.on_request_routed(pending(REQUEST, request_id=name), name, None)  # type: ignore[arg-type]
        ours.on_request_completed(name, name)  # type: ignore[arg-type]
    chosen(ours, [replica("a")], pending(REQUEST))
    assert list(ours._sent) == ["a"]


def test_a_gang_that_replaces_its_ranks_takes_nothing_while_others_run() -> None:
    ours, busy = router(), replica("busy", 90.0)
    lost = replica("lost")
    lost.routing_stats["replacing"] = True
    assert chosen(ours, [lost, busy], pending(REQUEST)) == [["busy"]]
    assert chosen(ours, [lost], pending(REQUEST)) == [["lost"]]  # it waits where ranks start


def test_a_loss_counts_before_the_gang_reports_it() -> None:
    ours, gangs = router(), [replica("a"), replica("b", 90.0)]
    ours.on_request_routed(pending(REQUEST, request_id="first"), "a", None)  # type: ignore[arg-type]
    ours.on_request_completed("a", "first")  # type: ignore[arg-type]
    ours.lose(REQUEST.request_id)
    assert chosen(ours, gangs, pending(REQUEST)) == [["b"]]
    gangs[0].routing_stats["reported_at"] = time.time() + 1
    assert chosen(ours, gangs, pending(REQUEST)) == [["a"], ["b"]]


def test_a_request_keeps_its_place_when_it_waits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Serve's own queue: whoever waits is served in the order of admission."""
    waiting = Waiting()
    monkeypatch.setattr("service.routing.waiting_for", lambda _: waiting)
    ours = router()
    ours._pending_requests_to_fulfill, ours._pending_requests_to_route = deque(), deque()
    monkeypatch.setattr(ours, "_maybe_start_routing_tasks", lambda: None)
    monkeypatch.setattr(ours, "_add_pending_request_to_indices", lambda _: None)
    monkeypatch.setattr(ours, "_remove_pending_request_from_indices", lambda _: None)
    monkeypatch.setattr(ours, "_cancel_routing_task_for_pending_request", lambda _: None)
    monkeypatch.setattr(ours, "_record_queue_wait_time", lambda _: None)

    async def story() -> None:
        served = []

        async def wait(name: str, place: float) -> None:
            waiting.enter(name, place)
            metadata = RequestMetadata(request_id=name, internal_request_id=name)
            request = PendingRequest(args=[replace(REQUEST, request_id=name)], kwargs={}, metadata=metadata)
            await ours._choose_replica_for_request(request)
            served.append(name)

        tasks = [asyncio.ensure_future(wait(*each)) for each in (("second", 2.0), ("third", 3.0), ("retried", 1.0))]
        await asyncio.sleep(0)
        for _ in tasks:
            ours._fulfill_next_pending_request(replica("a"))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert served == ["retried", "second", "third"]

    asyncio.run(story())


def test_what_a_gang_took_waits_no_more() -> None:
    ours, waiting = router(), waiting_for("model-m")
    waiting.enter(REQUEST.request_id, 1.0)
    ours.on_request_routed(pending(REQUEST), "a", None)  # type: ignore[arg-type]
    assert len(waiting) == 0


def test_serve_finds_it_by_name() -> None:
    config = RequestRouterConfig(request_router_class="service.routing:LeastBacklogRouter")
    assert config.get_request_router_class() is LeastBacklogRouter
