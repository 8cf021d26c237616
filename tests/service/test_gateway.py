"""The gateway itself, without Serve: who is let in, its table while it runs, and what it still takes when it drains."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from ray.serve.handle import DeploymentResponseGenerator
from ray.serve.schema import ServeStatus

from deploy.api_keys import digest
from deploy.model_sections import Elastic
from service import dispatch
from service.api.backend import Restarted
from service.gateway import Gateway
from service.jobs.requests import new_job
from service.jobs.store import JobStore
from service.state import shared_turns
from service.state.model_states import ModelState
from service.state.tickets import Prospect
from sp_core.degrees import ParallelDegrees
from tests.support.backend import FakeBackend, a_model
from workers.errors import (
    AdminOnly,
    DeadlineExceeded,
    GangLost,
    InvalidParameter,
    JobsUnavailable,
    ModelNotAllowed,
    ModelNotFound,
    ModelUnavailable,
    RateLimited,
    RequestFailed,
    ShuttingDown,
    SprayError,
    Unauthorized,
)
from workers.gang.cost import Cost, Costs
from workers.messages import Begun, GenerationRequest, GenerationResult

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

    def run(request: GenerationRequest, caller: str, *_: Any) -> Any:
        seen.append(caller)
        return inner.generate(request)

    monkeypatch.setattr(opened._dispatcher, "run", run)
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
    monkeypatch.setattr(opened._dispatcher, "run", lambda request, *_: inner.generate(request))
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


@pytest.mark.parametrize("keys", [{"api_keys_env": "NO_KEYS"}, {"api_keys_file": "/none/keys.yaml"}])
def test_keys_that_are_asked_for_and_missing_close_an_open_gateway(opened: Gateway, keys: dict[str, str]) -> None:
    local = TABLE | {"local_only": True}
    asyncio.run(opened.reconfigure(local))
    opened.admit(None)
    for _ in range(2):  # Serve may tell a gateway again
        with pytest.raises(RuntimeError, match=r"KEYS|keys\.yaml"):
            asyncio.run(opened.reconfigure(TABLE | keys))
        with pytest.raises(Unauthorized):
            opened.admit(None)
        assert opened.local_only, "nothing is let in before the keys are known"
    asyncio.run(opened.reconfigure(local))
    opened.admit(None)


@pytest.mark.parametrize(
    "missing",
    [
        {"jobs": {"folder": None, "url_env": "NO_URL"}},
        {"webhook_hosts": ["hooks.example.com"], "webhook_key_env": "NO_HOOKS"},
    ],
)
def test_what_else_is_missing_withdraws_a_key_nevertheless(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, missing: dict[str, Any]
) -> None:
    monkeypatch.setenv("KEYS", "k1,k2")
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "KEYS"}))
    monkeypatch.setenv("OTHER", "k2")
    asyncio.run(opened.reconfigure(TABLE | {"api_keys_env": "OTHER"} | missing))
    opened.admit("Bearer k2")
    with pytest.raises(Unauthorized):
        opened.admit("Bearer k1")
    with pytest.raises(RuntimeError, match="NO_"):
        asyncio.run(Gateway("other").reconfigure(TABLE | missing))


def handle_of(remote: Any) -> Any:
    """A dispatcher's way to gangs that are called so."""

    async def handle(model: str) -> Any:
        return SimpleNamespace(generate=SimpleNamespace(remote=remote))

    return handle


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

    for pause in ("PAUSE_S", "RECOVERY_S"):
        monkeypatch.setattr(dispatch, pause, 0)
    monkeypatch.setattr(opened._dispatcher, "_handle", handle_of(remote))
    monkeypatch.setattr(opened._dispatcher, "_attended", attended)
    return sent


RESULT = GenerationResult((b"",), (1,), ParallelDegrees(), 0.25, (0.25,), 0.5)


@pytest.mark.parametrize(
    ("reports", "pays"),
    [
        ([DeadlineExceeded("queued")], False),
        ([ModelUnavailable("failed")], False),
        ([ModelNotFound("removed")], False),
        ([Begun(), InvalidParameter("size", "of the ranks' check")], False),
        ([Begun(), InvalidParameter("prompt", "seen by a guardrail", "content_policy_violation")], True),
        ([Begun(), RequestFailed("a step")], True),
        ([Begun(), GangLost("ranks"), ModelUnavailable("failed")], True),
        ([Begun(), RESULT], True),
    ],
)
def test_a_key_pays_for_what_was_begun(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reports: list[Any], pays: bool
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys: [{{name: ann, sha256: {digest('k1')}, max_work_per_minute: 1}}]")
    lost = [i for i, each in enumerate(reports) if isinstance(each, GangLost)]
    serving(opened, monkeypatch, *([reports[: lost[0] + 1], reports[lost[0] + 1 :]] if lost else [reports]))

    async def story() -> None:
        await opened.reconfigure(
            TABLE | {"models": [a_model("one").model_dump(mode="json")], "api_keys_file": str(keys)}
        )
        opened.admit("Bearer k1")
        with contextlib.suppress(SprayError):
            await ask(opened, REQUEST)
        assert bool(opened._access._keyring.used().get("ann")) == pays

    asyncio.run(story())


def test_a_job_runs_in_its_owners_name_without_its_limits(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys: [{{name: ann, sha256: {digest('k1')}, models: [one], max_work_per_minute: 1}}]")
    serving(opened, monkeypatch, [Begun(), RESULT], [Begun(), RESULT])
    seen = []
    monkeypatch.setattr(dispatch, "fingerprint", lambda caller, *_: seen.append(caller) or "0")

    async def story() -> None:
        await opened.reconfigure(
            TABLE | {"models": [a_model("one").model_dump(mode="json")], "api_keys_file": str(keys)}
        )
        opened.admit("Bearer k1")
        assert opened.caller() == "ann"
        with pytest.raises(JobsUnavailable), opened.charge(REQUEST):
            raise JobsUnavailable("away")  # nothing was accepted, and nothing is charged
        with opened.charge(REQUEST):
            pass
        with pytest.raises(RateLimited), opened.charge(REQUEST):
            pass
        with pytest.raises(ModelNotAllowed), opened.charge(replace(REQUEST, model="two")):
            pass
        opened.admit("Bearer k1")
        assert [report async for report in opened._run_for("ann", REQUEST)] == [RESULT]
        assert [report async for report in opened._run_for("", REQUEST)] == [RESULT]
        assert seen == ["ann", ""]
        opened.draining = True
        with pytest.raises(ShuttingDown), opened.charge(REQUEST):
            pass
        assert opened._room() == {}

    asyncio.run(story())


def test_there_is_room_for_a_job_that_wakes_a_model_and_one_behind_each_gang(opened: Gateway) -> None:
    opened._poller._models = {"one": a_model("one"), "two": a_model("two")}
    opened._poller._states = {"one": ModelState("running", "", {"RUNNING": 2}), "two": ModelState("asleep")}
    assert opened._room() == {"one": 3, "two": 1}
    opened._poller._states["one"] = ModelState("running", "", {"RUNNING": 1, "PENDING_MIGRATION": 1, "STARTING": 1})
    assert opened._room() == {"one": 3, "two": 1}  # a gang on a node that drains takes requests until another runs
    wide = a_model("one").model_copy(update={"parallel": ParallelDegrees(ulysses_degree=4), "elastic": Elastic()})
    opened._models = {"one": wide}
    assert opened._room() == {"one": 17, "two": 1}  # an elastic gang takes eight


async def ask(gate: Gateway, request: GenerationRequest, key: str | None = None) -> list[Any]:
    if key is not None:
        gate.admit(key)
    return [report async for report in gate.generate(request)]


def test_how_requests_end_is_counted(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = a_model("counted")
    request = replace(REQUEST, model="counted")
    result = GenerationResult((b"",), (1,), ParallelDegrees(), 0.25, (0.25,), 0.5)
    answers: list[GenerationResult | Exception] = [GangLost("ranks"), result, RequestFailed("no"), result]
    answer = object.__new__(DeploymentResponseGenerator)

    async def attended(*_: Any) -> AsyncGenerator[GenerationResult]:
        coming = answers.pop(0)
        if isinstance(coming, Exception):
            raise coming
        yield coming
        yield coming

    for pause in ("PAUSE_S", "RECOVERY_S"):
        monkeypatch.setattr(dispatch, pause, 0)
    monkeypatch.setattr(opened._dispatcher, "_handle", handle_of(lambda *_: answer))
    monkeypatch.setattr(opened._dispatcher, "_attended", attended)

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
