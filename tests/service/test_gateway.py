"""The gateway itself, without Serve: who is let in, its table while it runs, and what it still takes when it drains."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from ray.exceptions import OwnerDiedError, RayActorError
from ray.serve.handle import DeploymentResponseGenerator
from ray.serve.schema import ServeStatus

from deploy.api_keys import digest
from deploy.spec import Elastic
from service import gateway
from service.api.backend import Restarted, Waiting
from service.api.errors import answer
from service.gateway import Gateway
from service.jobs.requests import new_job
from service.jobs.store import JobStore
from service.routing import LeastBacklogRouter
from service.state import quarantine, router_registry, shared_turns
from service.state.head_store import HeadStore
from service.state.model_states import ModelState
from service.state.quarantine import Quarantine
from service.state.turns import Prospect
from service.state.waiting import Place, waiting_for
from sp_core.degrees import ParallelDegrees
from tests.support.backend import FakeBackend, a_model
from workers import messages
from workers.errors import (
    AdminOnly,
    DeadlineExceeded,
    GangLost,
    ModelNotAllowed,
    ModelNotFound,
    ModelUnavailable,
    OutOfMemory,
    QueueFull,
    RateLimited,
    RequestFailed,
    RequestQuarantined,
    ShuttingDown,
    Unauthorized,
)
from workers.gang.cost import Cost, Costs
from workers.messages import Begun, GenerationRequest, GenerationResult, StepEvent

REQUEST = GenerationRequest("a", "one", "a cup", 64, 64, 4, seed=1)
METRICS = {"host": "127.0.0.1", "port": None}
TABLE = {
    "models": [],
    "draining": False,
    "max_body_bytes": 4096,
    "api_keys_env": None,
    "metrics": METRICS,
    "models_folder": None,
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """A gateway that sees no cluster."""
    monkeypatch.setattr("service.state.poller._read", lambda: (ServeStatus(), [], [], {}))
    return Gateway("test")


@pytest.mark.parametrize("header", ["Bearer k1", "Bearer k2", "bearer k2"])
def test_each_of_several_keys_opens(opened: Gateway, monkeypatch: pytest.MonkeyPatch, header: str) -> None:
    asyncio.run(opened.reconfigure(TABLE))
    opened.admit(None)  # until keys are asked for
    monkeypatch.setenv("KEYS", "k1, k2,")
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    opened.admit(header)


@pytest.mark.parametrize("key", ["ключ", "voilà", "é"])
def test_a_key_may_have_any_letters(opened: Gateway, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Servers decode headers as latin-1, whatever clients send."""
    monkeypatch.setenv("KEYS", key)
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    opened.admit(f"Bearer {key}")
    opened.admit("Bearer " + key.encode().decode("latin-1") + " ")


@pytest.mark.parametrize(
    "header", [None, "", "k1", "Bearer ", "Bearer k", "Bearer k1, k2,", "Bearer K1", "Basic k1", "Bearer é"]
)
def test_nothing_else_opens(opened: Gateway, monkeypatch: pytest.MonkeyPatch, header: str | None) -> None:
    monkeypatch.setenv("KEYS", "k1, k2,")
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    with pytest.raises(Unauthorized):
        opened.admit(header)


@pytest.mark.parametrize("keys", ["", " , "])
def test_a_gateway_whose_keys_are_missing_does_not_open(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    monkeypatch.setenv("KEYS", keys)
    with pytest.raises(RuntimeError, match="api_keys_env is KEYS, but"):
        asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))


def test_what_a_key_may_do(opened: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (file := tmp_path / "keys.yaml").write_text(
        f"keys:\n- {{name: web, sha256: {digest('k1')}, models: [one], max_concurrent: 1}}\n"
        f"- {{name: ops, sha256: {digest('k2')}, scope: admin}}\n"
    )
    inner = FakeBackend()
    seen: list[str] = []

    def generate(request: GenerationRequest) -> Any:
        seen.append(opened.caller())
        return inner.generate(request)

    monkeypatch.setattr(opened, "_generate", generate)
    models = [a_model(name).model_dump(mode="json") for name in ("one", "two")]

    async def story() -> None:
        await opened.reconfigure(TABLE | {"models": models, "api_keys_file": str(file)})
        opened.admit("Bearer k2", admin=True)
        opened.admit("Bearer k1")
        with pytest.raises(AdminOnly, match="'web' has the scope 'generate'"):
            opened.admit("Bearer k1", admin=True)
        opened.admit("Bearer k1")
        with pytest.raises(ModelNotAllowed, match="'web' may not ask 'two'; it may: one"):
            await ask(opened, replace(REQUEST, model="two"))
        running = asyncio.ensure_future(ask(opened, replace(REQUEST, prompt="slow")))
        await asyncio.sleep(0)
        with pytest.raises(RateLimited, match="at most 1"):
            await ask(opened, REQUEST)
        opened.admit("Bearer k2")
        await ask(opened, REQUEST)
        inner.released.set()
        await running
        opened.admit("Bearer k1")
        await ask(opened, REQUEST)

    asyncio.run(story())
    assert seen == ["web", "ops", "web"]


def test_the_table_of_a_gateway_changes_while_it_runs(opened: Gateway) -> None:
    one, two = a_model("one"), a_model("two")
    for models in ([one], [one, two], [two]):
        asyncio.run(opened.reconfigure(TABLE | {"models": [model.model_dump(mode="json") for model in models]}))
        assert opened.models() == {model.name: model for model in models}
        assert opened.max_body_bytes == 4096


def test_several_gateways_share_their_turns(opened: Gateway) -> None:
    for gateways in (1, 2, 1):
        asyncio.run(opened.reconfigure(TABLE | {"gateways": gateways}))
        assert shared_turns._several == (gateways > 1)


def test_a_draining_gateway_takes_nothing_and_finishes_what_it_has(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = FakeBackend()
    monkeypatch.setattr(opened, "_generate", inner.generate)
    models = [model.model_dump(mode="json") for model in inner.models().values()]

    async def story() -> None:
        await opened.reconfigure(TABLE | {"models": models})
        request = replace(REQUEST, prompt="slow")
        running = asyncio.ensure_future(anext(opened.generate(request)))
        await asyncio.sleep(0)
        assert opened.in_flight == 1
        await opened.reconfigure(TABLE | {"models": models, "draining": True})
        with pytest.raises(ShuttingDown):
            await anext(opened.generate(REQUEST))
        assert opened.in_flight == 1
        inner.released.set()
        assert (await running).step == 1

    asyncio.run(story())
    assert len(inner.requests) == 1


def test_keys_that_are_missing_later_leave_those_that_were(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "k1")
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "NO_KEYS"}))
    opened.admit("Bearer k1")
    with pytest.raises(Unauthorized):
        opened.admit("Bearer k2")


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
    monkeypatch.setattr(gateway, "PATIENCE_S", 0.01)
    monkeypatch.setattr(gateway, "_applications", list)
    monkeypatch.setattr(opened, "states", lambda: found)
    answer = Answer()

    async def story() -> None:
        reports = opened._attended("one", answer)  # type: ignore[arg-type]
        assert await anext(reports) == Waiting(found["one"])
        if state is None:
            del found["one"]
        else:
            found["one"] = state
        with raised:
            await anext(reports)

    asyncio.run(story())
    assert answer.cancelled


def test_a_request_that_waits_hears_its_place(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [Prospect(2, 7.5), None]

    async def standing(application: str, request_id: str) -> Prospect | None:
        assert (application, request_id) == ("model-one", "a")
        return places.pop(0)

    monkeypatch.setattr(gateway, "PATIENCE_S", 0.01)
    monkeypatch.setattr("service.state.router_registry.standing", standing)
    monkeypatch.setattr(opened, "states", lambda: {"one": ModelState("running", queued=4)})

    async def story() -> None:
        async with contextlib.aclosing(opened._attended("one", Answer(), "a")) as reports:  # type: ignore[arg-type]
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
        reports = opened._attended("one", answer)  # type: ignore[arg-type]
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
        async with contextlib.aclosing(opened._attended("one", answer)) as reports:  # type: ignore[arg-type]
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


def serving(opened: Gateway, monkeypatch: pytest.MonkeyPatch, *answers: list[Any]) -> list[GenerationRequest]:
    """Let gangs answer with these reports, one list per request; an exception is raised. Returns what was sent."""
    coming, sent = list(answers), []
    answer = object.__new__(DeploymentResponseGenerator)

    def remote(request: GenerationRequest, _: str) -> DeploymentResponseGenerator[Any]:
        sent.append(request)
        return answer

    async def attended(*_: Any) -> AsyncGenerator[Any]:
        for report in coming.pop(0):
            if isinstance(report, Exception):
                raise report
            yield report

    monkeypatch.setattr(gateway, "PAUSE_S", 0)
    monkeypatch.setattr(opened, "_handle", lambda model: SimpleNamespace(generate=SimpleNamespace(remote=remote)))
    monkeypatch.setattr(opened, "_attended", attended)
    return sent


RESULT = GenerationResult((b"",), (1,), ParallelDegrees(), 0.25, (0.25,), 0.5)
LOST = [Begun(), GangLost("ranks")]


def test_a_job_runs_in_its_owners_name_without_its_limits(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys: [{{name: ann, sha256: {digest('k1')}, models: [one], max_work_per_minute: 1}}]")
    serving(opened, monkeypatch, [Begun(), RESULT], [Begun(), RESULT])
    seen = []
    monkeypatch.setattr(gateway, "fingerprint", lambda caller, request: seen.append(caller) or "0")

    async def story() -> None:
        await opened.reconfigure(
            TABLE | {"models": [a_model("one").model_dump(mode="json")], "api_keys_file": str(keys)}
        )
        opened.admit("Bearer k1")
        assert opened.caller() == "ann"
        opened.charge(REQUEST)
        with pytest.raises(RateLimited):
            opened.charge(REQUEST)
        with pytest.raises(ModelNotAllowed):
            opened.charge(replace(REQUEST, model="two"))
        opened.admit("Bearer k1")
        assert [report async for report in opened._run_for("ann", REQUEST)] == [RESULT]
        assert [report async for report in opened._run_for("", REQUEST)] == [RESULT]
        assert seen == ["ann", ""]
        opened.draining = True
        with pytest.raises(ShuttingDown):
            opened.charge(REQUEST)
        assert opened._room() == {}

    asyncio.run(story())


def test_there_is_room_for_a_job_that_wakes_a_model_and_one_behind_each_gang(opened: Gateway) -> None:
    opened._poller._models = {"one": a_model("one"), "two": a_model("two")}
    opened._poller._states = {"one": ModelState("running", "", {"RUNNING": 2}), "two": ModelState("asleep")}
    assert opened._room() == {"one": 3, "two": 1}
    wide = a_model("one").model_copy(update={"parallel": ParallelDegrees(ulysses_degree=4), "elastic": Elastic()})
    opened._models = {"one": wide}
    assert opened._room() == {"one": 17, "two": 1}  # an elastic gang takes eight


async def ask(gate: Gateway, request: GenerationRequest, key: str | None = None) -> list[Any]:
    if key is not None:
        gate.admit(key)
    return [report async for report in gate.generate(request)]


def test_a_request_costs_at_most_two_gangs_however_often_it_is_asked(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = serving(opened, monkeypatch, LOST, LOST, [Begun(), RESULT], [Begun(), RESULT])
    drawn = replace(REQUEST, seed_drawn=True)

    async def story() -> None:
        with pytest.raises(GangLost, match="lost its ranks 2 times"):
            await ask(opened, drawn)
        for again in (drawn, replace(drawn, request_id="b", seed=2), replace(drawn, report_steps=True)):
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


def test_a_gang_that_ends_before_the_request_begins_is_not_its_cost(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(opened, monkeypatch, LOST, [RayActorError()], [RayActorError()], [Begun(), RESULT])
    restarts = [Restarted(attempt, "the ranks of 'one' were lost", begun=attempt == 2) for attempt in (2, 3, 4)]
    assert asyncio.run(ask(opened, REQUEST)) == [*restarts, RESULT]


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
    monkeypatch.setattr(opened, "_attended", lambda *_: gateway._with_result(told(given.pop(0))))
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
            await opened._quarantine.count("a")
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
    kept = opened._quarantine

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
    inner = opened._handle("full").generate.remote

    def remote(request: GenerationRequest, caller: str) -> Any:
        places.append(waiting.place(request.request_id))
        return inner(request, caller)

    monkeypatch.setattr(opened, "_handle", lambda _: SimpleNamespace(generate=SimpleNamespace(remote=remote)))

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
    serving(opened, monkeypatch, [Begun(), RESULT])

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
        waiting.leave("another")
        waiting.leave("a third")

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
        handle = SimpleNamespace(generate=SimpleNamespace(remote=lambda *_: answer))
        monkeypatch.setattr(opened, "_handle", lambda _: handle)
        monkeypatch.setattr("service.gateway.DeploymentResponseGenerator", Answer)
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


def test_how_requests_end_is_counted(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = a_model("counted")
    request = replace(REQUEST, model="counted")
    result = GenerationResult((b"",), (1,), ParallelDegrees(), 0.25, (0.25,), 0.5)
    answers: list[GenerationResult | Exception] = [GangLost("ranks"), result, RequestFailed("no"), result]
    answer = object.__new__(DeploymentResponseGenerator)
    handle = SimpleNamespace(generate=SimpleNamespace(remote=lambda *_: answer))

    async def attended(*_: Any) -> AsyncGenerator[GenerationResult]:
        coming = answers.pop(0)
        if isinstance(coming, Exception):
            raise coming
        yield coming
        yield coming

    monkeypatch.setattr(gateway, "PAUSE_S", 0)
    monkeypatch.setattr(opened, "_handle", lambda model: handle)
    monkeypatch.setattr(opened, "_attended", attended)

    async def story() -> None:
        await opened.reconfigure(TABLE | {"models": [counted.model_dump(mode="json")]})
        async with contextlib.aclosing(opened.generate(request)) as reports:  # lost once, then answered
            assert await anext(reports) == Restarted(2, "the ranks of 'counted' were lost", begun=False)
            assert await anext(reports) is result
            assert count("requests_in_flight") == 1
        with pytest.raises(RequestFailed):
            await anext(opened.generate(request))

    def count(name: str, **labels: str) -> float | None:
        return prometheus_client.REGISTRY.get_sample_value(f"spray_{name}", {"model": "counted", **labels})

    asyncio.run(story())
    outcomes = [count("requests_total", outcome=outcome) for outcome in ("ok", "generation_failed", "cancelled")]
    assert outcomes == [1, 1, 0]
    assert (count("request_losses_total"), count("requests_in_flight")) == (1, 0)
    queue = {"replica": "", "rank": "", "stage": "queue"}
    assert count("request_seconds_count") == 1
    assert count("stage_seconds_sum", **queue) == 0  # computed longer than it took


def test_a_job_that_would_be_late_is_refused_with_what_is_ahead_of_it(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = Costs("QwenImagePipeline", (Cost(64, 64, 1, 1, 1, 0, 5.0, 1.0, 4.0, 0.5, 2),))
    gang = {"request_s": 21.0, "costs": known.as_stats()}
    states = {"late": ModelState("running", replicas={"RUNNING": 2}, gangs=(gang, gang))}
    monkeypatch.setattr(opened, "states", lambda: states)
    (file := tmp_path / "keys.yaml").write_text(
        f"keys:\n- {{name: web, sha256: {digest('k1')}, models: [late]}}\n- {{name: ann, sha256: {digest('k2')}}}\n"
    )

    async def prospect(application: str, caller: str) -> Prospect:
        return Prospect(1, 4.0)

    monkeypatch.setattr("service.state.router_registry.prospect", prospect)

    async def story() -> None:
        models = [a_model(name).model_dump(mode="json") for name in ("late", "one")]
        table = TABLE | {"models": models, "api_keys_file": str(file)}
        await opened.reconfigure(table | {"jobs": {"folder": str(tmp_path / "jobs"), "url_env": None}})
        await opened.runner.stop()  # nobody takes what waits
        request = replace(REQUEST, model="late", guidance_scale=0.0)  # 21 s
        opened.admit("Bearer k1")
        await opened._backlog.tell({})
        await opened.check_job(request, "standard", 4.5)
        for priority in ("standard", "batch"):
            await opened.jobs.ask(JobStore.submit, new_job(request, "web", priority))
        with pytest.raises(DeadlineExceeded, match=r"wait about 14\.5 s; its deadline is in 14\.0 s"):
            await opened.check_job(request, "standard", 14.02)
        await opened.check_job(request, "standard", 15)
        await opened.check_job(request, "interactive", 5)  # it overtakes both
        with pytest.raises(DeadlineExceeded, match=r"about 25\.0 s"):
            await opened.check_job(request, "batch", 24)
        await opened.check_job(request, "batch", None)
        with pytest.raises(ModelNotAllowed):
            await opened.check_job(replace(request, model="one"), "batch", None)

    asyncio.run(story())
