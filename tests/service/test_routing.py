"""The router, as Ray Serve calls it: a request waits for its turn and is sent to the gang that it is given."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from service.routing import LeastBacklogRouter
from service.state import gang_state
from service.state.waiting import Place, waiting_for
from tests.service.test_turns import settle
from workers.gang.cost import Cost, Costs
from workers.gang.stats import GangBacklog
from workers.messages import GenerationRequest

GANGS = DeploymentID("Gang", app_name="model-m")
SHAPE = (512, 768, 1)


def request(name: str) -> GenerationRequest:
    return GenerationRequest(name, "m", "a cup", 512, 768, 10, seed=1)


def replica(name: str, backlog_s: float = 0.0, shapes: frozenset[Any] = frozenset(), costs: Costs | None = None) -> Any:
    async def get_queue_len(deadline_s: float) -> int:
        return 0

    stats = GangBacklog(backlog_s, time.time() - 1, 20.0, shapes).as_stats()
    stats |= {"costs": costs.as_stats()} if costs else {}
    return SimpleNamespace(replica_id=ReplicaID(name, GANGS), routing_stats=stats, get_queue_len=get_queue_len)


def pending(*args: Any) -> PendingRequest:
    name = args[0].request_id if args and isinstance(args[0], GenerationRequest) else "call"
    metadata = RequestMetadata(request_id=name, internal_request_id=f"internal-{name}")
    return PendingRequest(args=list(args), kwargs={}, metadata=metadata)


def routed(tell: Callable[[LeastBacklogRouter], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        router = LeastBacklogRouter(GANGS, DeploymentHandleSource.REPLICA)
        router.initialize_state()
        await asyncio.wait_for(tell(router), 60)

    asyncio.run(run())


async def choose(router: LeastBacklogRouter, call: PendingRequest, again: bool = False) -> str:
    chosen = await router._choose_replica_for_request(call, is_retry=again)
    return str(chosen.replica_id.unique_id)


def test_requests_go_to_the_warm_free_gang() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        router.update_replicas([replica("cold"), replica("warm", shapes=frozenset([SHAPE])), replica("busy", 90.0)])
        assert [await choose(router, pending(request(name))) for name in "xyz"] == ["warm", "cold", "busy"]

    routed(tell)


def test_a_request_waits_until_a_gang_has_ended_its_own() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        gang = replica("a")
        router.update_replicas([gang])
        first = pending(request("x"))
        await choose(router, first)
        router.on_request_routed(first, gang.replica_id, None)
        second = asyncio.create_task(choose(router, pending(request("y"))))
        router.on_request_completed(gang.replica_id, "internal-another")
        await settle()
        assert not second.done()
        router.on_request_completed(gang.replica_id, "internal-x")
        assert await second == "a"

    routed(tell)


def test_a_request_that_a_gang_refused_asks_again_and_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_state, "REFUSED_S", 0.02)

    async def tell(router: LeastBacklogRouter) -> None:
        gang, first = replica("a"), pending(request("x"))
        router.update_replicas([gang])
        await choose(router, first)
        second = asyncio.create_task(choose(router, pending(request("y"))))
        await settle()
        again = asyncio.create_task(choose(router, first, again=True))
        router.on_request_completed(gang.replica_id, "internal-x")  # Serve says it of refused ones too, when it likes
        assert await again == "a"
        await settle()
        assert not second.done()

    routed(tell)


def test_a_caller_who_leaves_before_the_gang_took_it_frees_the_gang() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        gang = replica("a")
        router.update_replicas([gang])
        await choose(router, pending(request("x")))
        router.on_request_completed(gang.replica_id, "internal-x")
        assert await choose(router, pending(request("y"))) == "a"

    routed(tell)


def test_a_model_that_sleeps_serves_who_waits_when_a_gang_comes() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        router.update_replicas([])
        waiting = asyncio.create_task(choose(router, pending(request("x"))))
        await settle()
        assert not waiting.done()
        router.update_replicas([replica("a")])
        assert await waiting == "a"

    routed(tell)


def test_a_gang_that_died_gets_nothing() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        dead, alive = replica("dead"), replica("alive", 90.0)
        router.update_replicas([dead, alive])
        router.on_replica_actor_died(dead.replica_id)
        await settle()
        assert set(router._turns._own._gangs) == {"alive"}
        assert await choose(router, pending(request("x"))) == "alive"

    routed(tell)


def test_a_gang_that_this_gateway_has_not_heard_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_state, "REFUSED_S", 0.02)

    async def tell(router: LeastBacklogRouter) -> None:
        router.update_replicas([])
        router._turns.know({"elsewhere": GangBacklog()})
        waiting = asyncio.create_task(choose(router, pending(request("x"))))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        router.update_replicas([replica("a")])
        assert await asyncio.wait_for(waiting, 10) == "a"

    routed(tell)


def test_shares_are_by_work_and_the_prospect_is_the_callers() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        gang, waiting = replica("a"), waiting_for("model-m")
        router.update_replicas([gang])
        await choose(router, pending(request("running")))
        for name, caller, steps in (("large", "one", 40), ("after it", "one", 1), ("small", "two", 1)):
            waiting.enter(name, Place(time.time(), caller))
            call = pending(replace(request(name), num_inference_steps=steps))
            asyncio.ensure_future(choose(router, call)).add_done_callback(lambda task: task.cancelled())
            await settle()
        standings = [await asyncio.to_thread(ask, router.standing, name) for name in ("large", "after it", "small")]
        assert [found and found.ahead for found in standings] == [0, 2, 1]  # from another thread, as a gateway asks
        assert [(await asyncio.to_thread(ask, router.prospect, caller)).ahead for caller in ("one", "two")] == [3, 2]
        for name in ("large", "after it", "small"):
            router._turns._own.leave(name)
            waiting.leave(name)

    def ask(what: Any, of: str) -> Any:
        return asyncio.run(what(of))

    routed(tell)


def test_what_a_request_takes_is_what_its_gangs_have_learned() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        assert router.takes(request("x")) == (0, 0)
        one, two = (
            Costs("FluxPipeline", (Cost(512, 768, 1, 1, 1, 0, step_s, 1.0, step_s / 2, 0.5, 2),))
            for step_s in (3.0, 5.0)
        )
        router.update_replicas([replica("one", costs=one), replica("two", costs=two), replica("new", costs=Costs())])
        assert router.takes(request("x")) == ((31 + 51) / 2, 15.5)  # the mean, and the fastest
        assert router._ticket(request("x"), 0.0).seconds == 41
        router.update_replicas([replica("older version")])
        assert router.takes(request("x")) == (0, 0)

    routed(tell)


def test_a_request_waits_for_what_others_cost_not_for_what_they_take() -> None:
    """On a quarter of an elastic gang."""

    async def tell(router: LeastBacklogRouter) -> None:
        costs = Costs("FluxPipeline", (Cost(512, 768, 1, 1, 1, 0, 3.0, 1.0, 1.5, 0.5, 2, 0.25),))
        router.update_replicas([replica("one", costs=costs)])
        assert router.takes(request("x")) == (31, 15.5)
        assert router._ticket(request("x"), 0.0).seconds == 31 / 4

    routed(tell)


def test_a_lost_gang_gets_nothing_while_others_run() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        lost, busy, first = replica("lost"), replica("busy", 90.0), pending(request("x"))
        router.update_replicas([lost, busy])
        assert await choose(router, first) == "lost"
        router.on_request_routed(first, lost.replica_id, None)
        router.lose("x")
        router.on_request_completed(lost.replica_id, "internal-x")
        await settle()
        assert await choose(router, pending(request("x"))) == "busy"

    routed(tell)


def test_callers_take_turns() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        gang, order, waiting = replica("a"), [], waiting_for("model-m")
        router.update_replicas([gang])

        async def serve(name: str, caller: str) -> None:
            waiting.enter(name, Place(time.time(), caller))
            call = pending(request(name))
            await choose(router, call)
            router.on_request_routed(call, gang.replica_id, None)
            order.append(name)
            router.on_request_completed(gang.replica_id, f"internal-{name}")

        who = [(f"many{i}", "many") for i in range(4)] + [("few0", "few"), ("few1", "few")]
        await asyncio.gather(*(serve(*each) for each in who))
        assert order == ["many0", "few0", "many1", "few1", "many2", "many3"]
        assert len(waiting) == 0

    routed(tell)


def test_calls_that_are_no_generation_fit_any_gang_and_cost_nothing() -> None:
    async def tell(router: LeastBacklogRouter) -> None:
        gang, call = replica("a"), pending()
        router.update_replicas([gang])
        assert await router.choose_replicas([gang], call) == [[gang]]
        assert call.routing_context.should_backoff  # without it Serve asks again and again without a pause
        router.on_request_routed(call, gang.replica_id, None)
        assert await choose(router, pending(request("x"))) == "a"

    routed(tell)


def test_reports_survive_the_way_through_serve() -> None:
    report = GangBacklog(3.0, 4.0, 5.0, frozenset([SHAPE]), busy=True)
    assert GangBacklog.from_stats(report.as_stats()) == report
    assert GangBacklog.from_stats({}) == GangBacklog()
    assert GangBacklog.from_stats({**report.as_stats(), "of_a_later_version": 1}) == report


def test_serve_finds_it_by_name() -> None:
    config = RequestRouterConfig(request_router_class="service.routing:LeastBacklogRouter")
    assert config.get_request_router_class() is LeastBacklogRouter


def test_the_waiting_are_counted_while_serves_thread_takes_one_out() -> None:
    waiting = waiting_for("model-counted")

    class Leaves:
        @property
        def of_job(self) -> bool:
            waiting.leave("b")
            return False

    for name in "abc":
        waiting.enter(name, Leaves())  # type: ignore[arg-type]
    assert waiting.callers == 3
    assert len(waiting) == 2
