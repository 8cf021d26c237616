"""Requests on their way to gangs, without Serve: what they hear, what is refused, what a lost gang costs."""

import asyncio
import contextlib
import inspect
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RaySystemError,
    TaskCancelledError,
)

from service import dispatch
from service.api.backend import Restarted, Waiting
from service.api.errors import answer
from service.gateway import Gateway
from service.routing import LeastBacklogRouter
from service.state import quarantine, router_registry
from service.state.head_store import HeadStore
from service.state.model_states import ModelState
from service.state.quarantine import Quarantine
from service.state.tickets import Prospect
from service.state.waiting import Place, waiting_for
from tests.service.test_gateway import REQUEST, RESULT, TABLE, ask, handle_of, opened, serving
from tests.support.backend import a_model
from workers import messages
from workers.errors import (
    UNKNOWN_LORA,
    DeadlineExceeded,
    GangLost,
    InvalidParameter,
    ModelNotFound,
    ModelUnavailable,
    OutOfMemory,
    QueueFull,
    RequestFailed,
    RequestQuarantined,
)
from workers.gang.cost import Cost, Costs
from workers.messages import Begun, GenerationRequest, GenerationResult, StepEvent

__all__ = ["opened"]


class Answer:
    """A gang's answer that never comes."""

    def __init__(self) -> None:
        self.cancelled = False

    async def __anext__(self) -> Any:
        await asyncio.Event().wait()

    def __aiter__(self) -> Any:
        return self

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize(
    ("state", "raised"),
    [
        (
            ModelState("failed", "rank 0: no memory"),
            pytest.raises(ModelUnavailable, match="cannot be started: rank 0: no memory"),
        ),
        (None, pytest.raises(ModelNotFound, match="'one' was removed")),
    ],
)
def test_a_request_that_waits_for_nothing_ends(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, state: ModelState | None, raised: Any
) -> None:
    found = {"one": ModelState("starting", queued=2)}
    monkeypatch.setattr(dispatch, "PATIENCE_S", 0.01)
    monkeypatch.setattr(dispatch, "_applications", list)
    monkeypatch.setattr(opened, "states", lambda: found)
    answer = Answer()

    async def story() -> None:
        reports = opened._dispatcher._attended("one", answer)  # type: ignore[arg-type]
        assert await anext(reports) == Waiting(found["one"])
        if state is None:
            del found["one"]
        else:
            found["one"] = state
        with raised:
            await anext(reports)

    asyncio.run(story())
    assert answer.cancelled


def test_a_request_that_has_not_begun_ends_with_its_model_and_another_is_finished(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application of a removed model stays until its gangs have finished what they compute."""
    monkeypatch.setattr(dispatch, "PATIENCE_S", 0.01)
    monkeypatch.setattr(dispatch, "_applications", lambda: ["model-one"])
    monkeypatch.setattr(opened, "states", dict)

    class Computes(Answer):
        said = False

        async def __anext__(self) -> Any:
            if self.said:
                await asyncio.sleep(0.1)
                return StepEvent(1, 4, 0.1)
            self.said = True
            return Begun()

    async def story() -> None:
        with pytest.raises(ModelNotFound, match="'one' was removed"):
            await asyncio.wait_for(anext(opened._dispatcher._attended("one", Answer())), 10)  # type: ignore[arg-type]
        async with contextlib.aclosing(opened._dispatcher._attended("one", Computes())) as reports:  # type: ignore[arg-type]
            assert await anext(reports) == Begun()
            assert await anext(reports) == Waiting(dispatch.REMOVED)  # a job's lease is renewed by what it hears
            assert StepEvent(1, 4, 0.1) in [await anext(reports) for _ in range(15)]

    asyncio.run(story())


def test_what_a_gang_computes_is_finished_though_others_of_its_model_cannot_be_started(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve may stop the last gang of a model whose new version has failed, and that gang finishes what it has."""
    monkeypatch.setattr(dispatch, "PATIENCE_S", 0.01)
    failed = ModelState("failed", "rank 0: no memory")
    monkeypatch.setattr(opened, "states", lambda: {"one": failed})

    class Computes(Answer):
        left: ClassVar = [Begun(), RESULT]

        async def __anext__(self) -> Any:
            if len(self.left) == 1:
                await asyncio.sleep(0.1)
            return self.left.pop(0)

    async def story() -> None:
        async with contextlib.aclosing(opened._dispatcher._attended("one", Computes())) as reports:  # type: ignore[arg-type]
            assert [await anext(reports) for _ in range(2)] == [Begun(), Waiting(failed)]
            while (report := await anext(reports)) == Waiting(failed):
                pass
            assert report == RESULT

    asyncio.run(story())


def test_a_removed_model_that_serve_does_not_have_ends_its_request(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask the controller may take long; until it has answered, the request goes on."""
    asked = threading.Event()

    def applications() -> list[str]:
        assert asked.wait(60)
        return []

    monkeypatch.setattr(dispatch, "PATIENCE_S", 0.01)
    monkeypatch.setattr(dispatch, "_applications", applications)
    monkeypatch.setattr(opened, "states", dict)

    class Stops(Answer):
        said = False

        async def __anext__(self) -> Any:
            if self.said:
                await asyncio.sleep(60)
            self.said = True
            return Begun()

    async def story() -> None:
        async with contextlib.aclosing(opened._dispatcher._attended("one", Stops())) as reports:  # type: ignore[arg-type]
            assert [await anext(reports) for _ in range(3)] == [Begun(), *[Waiting(dispatch.REMOVED)] * 2]
            asked.set()
            with pytest.raises(ModelNotFound, match="'one' was removed"):
                while True:
                    await anext(reports)

    asyncio.run(story())


def test_a_model_that_serve_knows_gets_its_router_without_a_question(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask the controller would block the loop for as long as it is away."""
    assert {"_check_exists", "_record_telemetry"} <= inspect.signature(serve.get_deployment_handle).parameters.keys()
    asked: list[dict[str, Any]] = []
    handle = SimpleNamespace(options=lambda **_: "router")
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *_, **how: asked.append(how) or handle)
    monkeypatch.setattr(dispatch, "KNOWN_S", 0.3)
    opened.cluster()

    async def story() -> None:
        with pytest.raises(ModelUnavailable, match="'one' is being deployed"):
            await opened._dispatcher._handle("one")
        soon = asyncio.create_task(opened._dispatcher._handle("one"))
        await asyncio.sleep(0)
        for _ in range(2):
            opened._dispatcher.greet("one")
        assert await soon == "router"

    asyncio.run(story())
    assert asked == [{"_check_exists": False, "_record_telemetry": False}]


def test_a_request_that_waits_hears_its_place(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [Prospect(2, 7.5), None]

    async def standing(application: str, request_id: str) -> Prospect | None:
        assert (application, request_id) == ("model-one", "a")
        return places.pop(0)

    monkeypatch.setattr(dispatch, "PATIENCE_S", 0.01)
    monkeypatch.setattr("service.state.router_registry.standing", standing)
    monkeypatch.setattr(opened, "states", lambda: {"one": ModelState("running", queued=4)})

    async def story() -> None:
        async with contextlib.aclosing(opened._dispatcher._attended("one", Answer(), "a")) as reports:  # type: ignore[arg-type]
            assert await anext(reports) == Waiting(ModelState("running", queued=4), 3, 7.5)
            assert await anext(reports) == Waiting(ModelState("running", queued=4))  # it has its gang, and computes

    asyncio.run(story())


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_caller_who_leaves_with_a_report_in_hand_frees_the_gang(opened: Gateway, turns: int) -> None:
    class Steps(Answer):
        async def __anext__(self) -> Any:
            return StepEvent(1, 4, 0.1)

    answer = Steps()

    async def story() -> None:
        reports = opened._dispatcher._attended("one", answer)  # type: ignore[arg-type]
        await anext(reports)
        for _ in range(turns):
            await asyncio.sleep(0)
        await reports.aclose()

    asyncio.run(story())
    assert answer.cancelled


@pytest.mark.parametrize("turns", range(6))
def test_a_caller_who_is_cancelled_around_a_report_frees_the_gang(opened: Gateway, turns: int) -> None:
    arrived = asyncio.Event()

    class Late(Answer):
        async def __anext__(self) -> Any:
            await arrived.wait()
            return StepEvent(1, 4, 0.1)

    answer = Late()

    async def call() -> None:
        async with contextlib.aclosing(opened._dispatcher._attended("one", answer)) as reports:  # type: ignore[arg-type]
            async for _ in reports:
                await asyncio.Event().wait()

    async def story() -> None:
        calling = asyncio.ensure_future(call())
        await asyncio.sleep(0.01)
        arrived.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling

    asyncio.run(story())
    assert answer.cancelled


LOST = [Begun(), GangLost("ranks")]


def test_a_request_costs_at_most_two_gangs_however_often_it_is_asked(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = serving(opened, monkeypatch, LOST, LOST, [Begun(), RESULT], [Begun(), RESULT])
    drawn = replace(REQUEST, seed_drawn=True)

    async def story() -> None:
        with pytest.raises(GangLost, match="lost its ranks 2 times"):
            await ask(opened, drawn)
        for again in (
            drawn,
            replace(drawn, request_id="b", seed=2),
            replace(drawn, report_steps=True, frames_chosen=True),
        ):
            with pytest.raises(RequestQuarantined):
                await ask(opened, again)
        assert len(sent) == 2
        assert await ask(opened, replace(drawn, prompt="another")) == [RESULT]
        now = time.time()
        monkeypatch.setattr(quarantine, "time", SimpleNamespace(time=lambda: now + quarantine.KEPT_S))
        assert await ask(opened, drawn) == [RESULT]

    asyncio.run(story())


@pytest.mark.parametrize("agreed", [True, False])
def test_too_large_a_request_goes_to_no_other_gang_and_costs_two_at_most(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, agreed: bool
) -> None:
    sent = serving(opened, monkeypatch, *[[Begun(), OutOfMemory("too large", agreed)]] * 3)

    async def story() -> None:
        for count in (1, 2):
            with pytest.raises(OutOfMemory, match="too large"):
                await ask(opened, REQUEST)
            assert len(sent) == count
        with pytest.raises(OutOfMemory if agreed else RequestQuarantined):  # agreed: it has cost nothing
            await ask(opened, REQUEST)

    asyncio.run(story())


@pytest.mark.parametrize(("name", "raised"), [("ink", ModelUnavailable), ("pencil", InvalidParameter)])
def test_a_gang_that_lacks_an_adapter_of_the_deployment_is_no_fault_of_the_caller(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, name: str, raised: type[Exception]
) -> None:
    """Its file may be gone, or it was deployed a moment ago. One that was taken out is not waited for."""
    serving(opened, monkeypatch, [Begun(), InvalidParameter("loras", f"no adapter {name!r}", UNKNOWN_LORA)])

    async def story() -> None:
        opened._dispatcher.follow({"one": a_model("one")})
        with pytest.raises(raised, match="no adapter"):
            await ask(opened, replace(REQUEST, loras=((name, 1.0),)))

    asyncio.run(story())


def test_what_one_job_has_lost_does_not_end_another(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that dies may take the gangs of several jobs with one body. Each may cost its own."""
    serving(opened, monkeypatch, LOST, [Begun(), RESULT], LOST, [Begun(), RESULT], LOST)
    monkeypatch.setattr(Quarantine, "clear", lambda *_: None)  # they lose their gangs before one is answered

    async def draw(name: str) -> list[Any]:
        request = replace(REQUEST, request_id=name)
        reports = opened._dispatcher.run(request, "", opened._traced(request), of_job=True)
        return [report async for report in reports]

    async def story() -> None:
        for name in ("job_a-1", "job_b-1"):
            assert (await draw(name))[-1] == RESULT
        with pytest.raises(GangLost):
            await draw("job_a-2")

    asyncio.run(story())


def test_quarantine_is_of_one_caller_and_one_body(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "k1,k2")
    serving(opened, monkeypatch, LOST, LOST, [RESULT], [RESULT])

    async def story() -> None:
        await opened.reconfigure(TABLE | {"api_keys_env": "KEYS"})
        with pytest.raises(GangLost):
            await ask(opened, REQUEST, "Bearer k1")
        with pytest.raises(RequestQuarantined):
            await ask(opened, REQUEST, "Bearer k1")
        assert await ask(opened, REQUEST, "Bearer k2") == [RESULT]
        assert await ask(opened, replace(REQUEST, seed=2), "Bearer k1") == [RESULT]  # the caller's own seed

    asyncio.run(story())


def test_an_answer_clears_a_request(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two losses are its own fault only if nothing came between."""
    serving(opened, monkeypatch, LOST, [Begun(), RESULT], LOST, [Begun(), RESULT])

    async def story() -> None:
        for _ in range(2):
            assert await ask(opened, REQUEST) == [Restarted(2, "the ranks of 'one' were lost"), RESULT]

    asyncio.run(story())


def test_who_leaves_with_the_answer_clears_its_request_too(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs and streams do: nothing that they need comes after it."""
    serving(opened, monkeypatch, LOST, [Begun(), RESULT], LOST, [Begun(), RESULT])

    async def story() -> None:
        for _ in range(2):
            async with contextlib.aclosing(opened.generate(REQUEST)) as reports:
                assert [type(await anext(reports)) for _ in range(2)] == [Restarted, GenerationResult]

    asyncio.run(story())


def test_a_gang_that_ends_before_the_request_begins_is_not_its_cost(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(opened, monkeypatch, LOST, [RayActorError()], [RayActorError()], [Begun(), RESULT])
    restarts = [Restarted(attempt, "the ranks of 'one' were lost", begun=attempt == 2) for attempt in (2, 3, 4)]
    assert asyncio.run(ask(opened, REQUEST)) == [*restarts, RESULT]


KILLED = OutOfMemoryError("1 worker was killed, its node was low on memory")


@pytest.mark.parametrize("error", [KILLED, NodeDiedError("node 2"), RaySystemError("a connection")])
def test_whatever_ray_ends_a_gang_for_the_request_goes_to_another_a_little_later(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Ray's memory monitor kills the actor of a gang, and does not say so by a `RayActorError`."""
    serving(opened, monkeypatch, [Begun(), error], [Begun(), RESULT], [Begun(), error], [Begun(), error])
    paused: list[float] = []
    sleep = asyncio.sleep
    monkeypatch.setattr(dispatch, "RECOVERY_S", 0.01)
    monkeypatch.setattr(dispatch.asyncio, "sleep", lambda seconds: paused.append(seconds) or sleep(seconds))
    assert asyncio.run(ask(opened, REQUEST)) == [Restarted(2, "the ranks of 'one' were lost"), RESULT]
    assert 0.01 in paused
    with pytest.raises(GangLost, match="lost its ranks 2 times"):
        asyncio.run(ask(opened, REQUEST))


def test_a_request_that_reaches_no_gang_ends_and_one_that_was_cancelled_too(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway and a gang of two versions may not understand each other, however often it is tried."""
    strange = [RaySystemError("a report cannot be read")]
    sent = serving(opened, monkeypatch, *[strange] * 5, *[strange] * 4, [RESULT], [TaskCancelledError()])

    async def story() -> None:
        with pytest.raises(ModelUnavailable, match="'one' cannot be reached"):
            await ask(opened, REQUEST)
        assert len(sent) == dispatch.UNREACHED
        assert (await ask(opened, REQUEST))[-1] == RESULT
        with pytest.raises(TaskCancelledError):
            await ask(opened, REQUEST)

    asyncio.run(story())


@pytest.mark.parametrize("lost", [RayActorError(), OwnerDiedError("ab", None, "")], ids=["its rank", "its gang"])
def test_an_answer_that_is_lost_while_it_is_encoded_is_drawn_again(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, lost: Exception
) -> None:
    async def result(given: Any) -> GenerationResult:
        if isinstance(given, Exception):
            raise given
        return RESULT

    async def told(given: Any) -> AsyncGenerator[Any]:
        yield Begun()
        yield messages.Answer(result(given))

    given = [lost, RESULT, RequestFailed("no such color")]
    sent = serving(opened, monkeypatch)
    monkeypatch.setattr(opened._dispatcher, "_attended", lambda *_: dispatch._with_result(told(given.pop(0))))
    assert asyncio.run(ask(opened, REQUEST))[-1] == RESULT
    assert len(sent) == 2
    with pytest.raises(RequestFailed, match="no such color"):
        asyncio.run(ask(opened, REQUEST))
    assert len(sent) == 3


def test_what_one_gateway_counts_all_know(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    store: set[str] = set()
    monkeypatch.setattr(HeadStore, "connected", lambda _: True)
    monkeypatch.setattr(HeadStore, "add", lambda _, key: store.add(key))
    monkeypatch.setattr(HeadStore, "remove", lambda _, key: store.discard(key))
    monkeypatch.setattr(HeadStore, "keys", lambda _: list(store))
    monkeypatch.setattr(quarantine, "PERIOD_S", 0.01)
    other = Quarantine()

    async def story() -> None:
        other.follow()
        for _ in range(2):
            await opened._dispatcher._quarantine.count("a")
        async with asyncio.timeout(60):
            while other.losses("a") < 2:
                await asyncio.sleep(0.01)
        with pytest.raises(RequestQuarantined):
            other.check("a")
        store.add("a key of another format")
        await asyncio.sleep(0.1)
        assert other.losses("a") == 2
        store.discard("a key of another format")
        monkeypatch.setattr(quarantine, "KEPT_S", -1.0)
        async with asyncio.timeout(60):
            while store:
                await asyncio.sleep(0.01)

    asyncio.run(story())


def test_what_the_store_does_not_have_yet_counts_all_the_same(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: HeadStore, key: str) -> bool:
        raise ConnectionError("the head is away")

    monkeypatch.setattr(HeadStore, "connected", lambda _: True)
    monkeypatch.setattr(HeadStore, "add", away)
    kept = opened._dispatcher._quarantine

    async def story() -> None:
        assert await kept.count("a") == 1
        await kept._take([])  # the head is back, and knows nothing
        assert await kept.count("a") == 2

    asyncio.run(story())


def test_the_queue_is_limited_but_not_for_a_request_that_waits_again(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = a_model("full").model_copy(update={"max_queued": 2})
    request = replace(REQUEST, model="full")
    waiting = waiting_for("model-full")
    places: list[Place | None] = []

    def lose(*_: Any) -> None:
        """Others came while this one ran, and fill the queue."""
        for number in range(2):
            waiting.enter(str(number), Place(time.time()))

    monkeypatch.setattr("service.state.router_registry.lose", lose)
    sent = serving(opened, monkeypatch, LOST, [Begun(), RESULT])
    inner: Any = asyncio.run(opened._dispatcher._handle("full")).generate.remote

    def remote(request: GenerationRequest, caller: str) -> Any:
        places.append(waiting.place(request.request_id))
        return inner(request, caller)

    monkeypatch.setattr(opened._dispatcher, "_handle", handle_of(remote))

    async def story() -> None:
        await opened.reconfigure(TABLE | {"models": [full.model_dump(mode="json")]})
        assert (await ask(opened, request))[-1] == RESULT
        assert len(sent) == 2
        assert len(set(places)) == 1, "it keeps its place"
        with pytest.raises(QueueFull):
            await ask(opened, replace(request, prompt="new"))
        waiting.leave("0")
        assert len(waiting) == 1, "who was answered waits no more"
        waiting.leave("1")

    asyncio.run(story())


def test_a_request_that_would_wait_too_long_is_refused_with_the_time_to_ask_again(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = a_model("patient").model_copy(update={"max_queued": 2, "max_queued_s": 30.0})
    request, waiting = replace(REQUEST, model="patient"), waiting_for("model-patient")
    prospects = [Prospect(9, 90.0), Prospect(1, 31.5), Prospect(1, 29.0), Prospect(9, 60.0)]
    counted: list[int] = []

    async def prospect(application: str, caller: str) -> Prospect:
        counted.append(len(waiting))
        return prospects.pop(0)

    monkeypatch.setattr("service.state.router_registry.prospect", prospect)
    serving(opened, monkeypatch, *[[Begun(), RESULT]] * 4)

    async def story() -> None:
        await opened.reconfigure(TABLE | {"models": [patient.model_dump(mode="json")]})
        with pytest.raises(QueueFull, match="would have to wait 90 s"):
            await ask(opened, request)  # all wait in other gateways
        waiting.enter("another", Place(time.time()))
        with pytest.raises(QueueFull, match="would have to wait 32 s, at most 30 s") as late:
            await ask(opened, request)
        assert answer(late.value)[2] == {"retry-after": "2"}
        assert len(waiting) == 1
        assert await ask(opened, request) == [RESULT]
        assert len(waiting) == 1
        waiting.enter("a third", Place(time.time()))
        with pytest.raises(QueueFull, match="2 requests wait") as full:
            await ask(opened, request)
        assert answer(full.value)[2] == {"retry-after": "6"}
        assert counted == [1, 2, 2, 3], "it is counted while it asks"
        prospects.append(Prospect(9, 90.0))
        for deadline_at in (None, time.time() + 1000):  # whoever waits for a job has left: it waits its turn
            job = replace(request, request_id="job", deadline_at=deadline_at)
            assert [report async for report in opened._run_for("somebody", job)] == [RESULT]
        waiting.leave("another")
        waiting.leave("a third")
        for number in range(9):
            waiting.enter(f"job {number}", Place(time.time(), of_job=True))
        prospects.append(Prospect(9, 29.0))
        assert await ask(opened, request) == [RESULT], "jobs take no place from callers"
        for number in range(9):
            waiting.leave(f"job {number}")

    asyncio.run(story())


def test_a_deadline_is_held_against_the_estimate_and_against_the_clock(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = a_model("late").model_dump(mode="json")

    async def prospect(application: str, caller: str) -> Prospect:
        return Prospect(3, 30.0)

    async def story() -> None:
        await opened.reconfigure(TABLE | {"models": [late]})
        request = replace(REQUEST, model="late", deadline_at=time.time() + 29)
        with pytest.raises(DeadlineExceeded, match=r"wait about 30\.0 s; its deadline is in 29\.0 s"):
            await ask(opened, request)
        answer = Answer()
        monkeypatch.setattr(opened._dispatcher, "_handle", handle_of(lambda *_: answer))
        monkeypatch.setattr("service.dispatch.DeploymentResponseGenerator", Answer)
        monkeypatch.setattr("service.state.router_registry.prospect", nothing_waits)
        with pytest.raises(DeadlineExceeded, match="it was stopped"):
            await ask(opened, replace(request, deadline_at=time.time() + 0.2))
        assert answer.cancelled
        assert (opened.in_flight, len(waiting_for("model-late"))) == (0, 0)

    async def nothing_waits(application: str, caller: str) -> Prospect:
        return Prospect(0, 0.0)

    monkeypatch.setattr("service.state.router_registry.prospect", prospect)
    asyncio.run(story())


def test_a_deadline_is_held_against_what_the_request_itself_takes(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing waits, and only against what was measured."""
    known = Costs("QwenImagePipeline", (Cost(64, 64, 1, 1, 1, 0, 5.0, 1.0, 4.0, 0.5, 2),))
    router = LeastBacklogRouter.__new__(LeastBacklogRouter)  # its own start needs Serve
    router._loop, router._costs = None, [known]
    monkeypatch.setattr(router, "gang_reports", list, raising=False)
    router_registry.register("model-late", router)
    serving(opened, monkeypatch, *([Begun(), RESULT] for _ in range(3)))

    async def story() -> None:
        await opened.reconfigure(TABLE | {"models": [a_model("late").model_dump(mode="json")]})
        request = replace(REQUEST, model="late", guidance_scale=0.0)  # four steps, 16.5 s at least
        with pytest.raises(DeadlineExceeded, match=r"in about 21\.0 s, 0\.0 s .*; its deadline is in 16\.0 s"):
            await ask(opened, replace(request, deadline_at=time.time() + 16.04))
        with pytest.raises(DeadlineExceeded, match=r"in about 41\.0 s"):
            await ask(opened, replace(request, num_inference_steps=8, deadline_at=time.time() + 17))
        for fits in (
            replace(request, deadline_at=time.time() + 17),
            replace(request, num_inference_steps=2, deadline_at=time.time() + 9),
            replace(request, width=32, deadline_at=time.time() + 9),  # smaller than all that was measured
        ):
            assert await ask(opened, fits) == [RESULT]

    asyncio.run(story())
