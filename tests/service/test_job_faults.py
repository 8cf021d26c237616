"""The harness of faults at jobs: what would be wrong is seen, and a run that was interrupted goes on."""

import json
import os
import random
import signal
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service.api.rest import rest_app
from service.jobs.engines import open_sqlite
from service.jobs.store import JobStore
from tests.benchmarks.job_faults import callers as module
from tests.benchmarks.job_faults.__main__ import _told_to_end
from tests.benchmarks.job_faults.callers import Callers
from tests.benchmarks.job_faults.ledger import Accepted, Ledger, read_lines
from tests.benchmarks.job_faults.link import SOCKET, Link
from tests.benchmarks.job_faults.report import report
from tests.benchmarks.job_faults.scene import NotNoticed, Scene
from tests.benchmarks.job_faults.strikes import STRIKES, plan
from tests.benchmarks.job_faults.together import HOLDING, PLAIN, groups, meanwhile, remaining
from tests.benchmarks.job_faults.verdict import Verdict, judge
from tests.service.jobs.stores import FILM, LEASE_S, new_job
from tests.support.backend import FakeBackend
from tests.support.in_process import served


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "FIRST_S", 0.01)


def accepted(**changes: Any) -> Accepted:
    return Accepted(**{"id": "job_1", "key": "k", "model": "film", "prompt": "a cup", "seed": 1} | changes)


def test_a_round_has_every_kind_once_and_a_longer_plan_begins_the_same() -> None:
    kinds = list(STRIKES)
    short, long = plan(7, kinds, 30), plan(7, kinds, 100)
    assert long[:30] == short
    assert set(Counter(long[: 3 * len(kinds)]).values()) == {3}
    assert plan(8, kinds, 100) != long


def test_some_faults_of_a_plan_come_in_pairs_and_those_of_a_longer_plan_too() -> None:
    kinds = plan(7, list(STRIKES), 200)
    found = groups(7, kinds)
    assert [number for group in found for number in group] == list(range(200))
    assert {len(group) for group in groups(7, kinds, share=1.0)} == {2}
    assert {len(group) for group in groups(7, kinds, share=0.0)} == {1}
    assert groups(7, kinds[:50])[:-1] == found[: len(groups(7, kinds[:50])) - 1]
    pairs = [(kinds[group[0]], kinds[group[1]]) for group in found if len(group) == 2]
    assert 30 <= len(pairs) <= 70
    assert {meanwhile(*pair) for pair in pairs} == {True, False}
    assert {*HOLDING, *PLAIN} <= set(STRIKES)
    assert meanwhile("store full", "gateway") and not meanwhile("gateway", "store full")


def test_a_fault_that_was_not_done_when_a_later_one_was_comes_again() -> None:
    assert remaining([[0], [1, 2], [3, 4], [5]], {0, 2, 3, 4}) == [[1], [5]]


def test_only_the_refusal_of_the_fault_itself_counts(tmp_path: Path) -> None:
    """A gateway that another fault has met refuses, too, or does not answer."""
    answers: list[Any] = [None, (503, "model_unavailable"), (202, ""), (503, "jobs_unavailable")]

    def once(*_: Any, **__: Any) -> Any:
        answer = answers.pop(0)
        told = answer and httpx.Response(answer[0], json={"error": {"code": answer[1]}})
        return SimpleNamespace(result=lambda: told)

    callers: Any = SimpleNamespace(once=once)
    nothing: Any = None
    scene = Scene(nothing, callers, nothing)
    answer, accepted = scene.refused(503, "jobs_unavailable", accepts=True)
    assert (answer.status_code, accepted, answers) == (503, 1, [])
    answers[:] = [None, (202, "")]
    with pytest.raises(NotNoticed, match="202"):
        scene.refused(503, "jobs_unavailable")


def test_another_process_is_struck_than_those_that_were_struck_in_vain() -> None:
    cluster: Any = SimpleNamespace(find=lambda process, node: {3, 5})
    nothing: Any = None
    scene = Scene(cluster, nothing, random.Random(0))
    assert {scene.one_of("gateway")[0] for _ in range(20)} == {3, 5}
    assert {scene.one_of("gateway", rather_not={3})[0] for _ in range(20)} == {5}
    assert {scene.one_of("gateway", rather_not={3, 5})[0] for _ in range(20)} == {3, 5}


def test_a_run_is_told_to_end_once_in_order_and_twice_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        told = _told_to_end()
        assert not told.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert told.is_set()
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_fault_is_settled_when_the_last_job_that_it_has_met_has_ended() -> None:
    nothing: Any = None
    scene = Scene(nothing, nothing, nothing, struck_at=100.0)
    assert (scene.settled, scene.settled_s) == (True, 0.0)
    scene.met = [accepted(until=104.0), accepted(until=0.0)]
    assert not scene.settled
    scene.met[1].until = 130.26
    assert (scene.settled, scene.settled_s) == (True, 30.3)
    scene.met = [accepted(until=99.0)]  # it had ended before the harm was done
    assert scene.settled_s == 0.0


def test_a_caller_submits_follows_and_downloads(tmp_path: Path) -> None:
    with served(rest_app(FakeBackend())) as url:
        callers = Callers(lambda: url, Ledger(tmp_path / "jobs.jsonl"), ["one"], 20)
        assert callers.probe().result(20) < 20
        callers.begin(2)
        callers.burst(3)
        callers.end()
    jobs = list(callers.ledger.jobs.values())
    assert len(jobs) >= 4
    assert {(job.state, job.trouble, len(job.sha256)) for job in jobs} == {("succeeded", "", 64)}
    assert all(job.until for job in jobs)
    assert callers.refused == []
    again = Ledger(tmp_path / "jobs.jsonl")
    assert again.jobs.keys() == callers.ledger.jobs.keys()
    assert again.open_jobs() == []


def test_a_submission_is_retried_with_its_key_and_no_other_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers: list[Any] = [
        httpx.ConnectError("nobody"), (503, {"retry-after": "0"}), (409, {}), (202, {}),
        (400, {"x-should-retry": "false"}),
    ]  # fmt: skip
    keys = []

    def request(_: httpx.Client, method: str, url: str, headers: dict[str, str], **__: Any) -> httpx.Response:
        keys.append(headers["idempotency-key"])
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer[0], headers=answer[1], json={"id": "job_1"})

    monkeypatch.setattr(module.httpx.Client, "request", request)
    callers = Callers(lambda: "http://nowhere", Ledger(tmp_path / "jobs.jsonl"), ["one"], 20)
    job = callers.submit()
    assert job is not None
    assert (job.id, len(keys), set(keys)) == ("job_1", 4, {job.key})
    assert callers.submit() is None
    assert keys[-1] != job.key
    assert callers.refused[0].startswith("400")


@pytest.mark.parametrize(
    ("status", "state", "trouble"), [(404, "queued", "nobody knows it"), (200, "running", "running 0.2 s after")]
)
def test_a_job_that_is_unknown_or_does_not_end_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, state: str, trouble: str
) -> None:
    told = {"attempt": 1, "state": state, "error": None}
    monkeypatch.setattr(module.httpx.Client, "request", lambda *_, **__: httpx.Response(status, json=told))
    callers = Callers(lambda: "http://nowhere", Ledger(tmp_path / "jobs.jsonl"), ["one"], 0.2)
    callers.follow(job := accepted())
    assert trouble in job.trouble
    assert not job.open


def test_an_interrupted_run_leaves_its_jobs_to_the_next(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    ledger = Ledger(file)
    ledger.write(accepted(id="job_1"))
    ledger.write(accepted(id="job_2"))
    ledger.write(accepted(id="job_2", state="succeeded"))
    with file.open("a") as cut:
        cut.write('{"id": "job_3", "ke')
    assert [line["id"] for line in read_lines(file)] == ["job_1", "job_2", "job_2"]
    found = Ledger(file)
    assert [(job.id, job.inherited) for job in found.open_jobs()] == [("job_1", True)]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = JobStore(open_sqlite(tmp_path / "jobs.db"), 1000.0)
    yield store
    store.close()


def verdict_of(store: JobStore, tmp_path: Path, *jobs: Accepted) -> Verdict:
    ledger = Ledger(tmp_path / "jobs.jsonl")
    for job in jobs:
        ledger.write(job)
    return judge(ledger, store, [], (0, []))


def published(store: JobStore, key: str = "k") -> str:
    job, _ = store.submit(new_job(idempotency_key=key))
    (held,) = store.claim({"film": 1}, "r", LEASE_S)
    store.publish(job.id, held.fence, [FILM], {})
    return job.id


def test_what_ended_once_is_sound(store: JobStore, tmp_path: Path) -> None:
    done = accepted(id=published(store), state="succeeded", sha256="0")
    struck, _ = store.submit(new_job(idempotency_key="s"))
    (held,) = store.claim({"film": 1}, "r", LEASE_S)
    store.lose_gang(struck.id, held.fence, 2, "rank 0 died")
    failed = accepted(id=struck.id, key="s", state="failed", code="request_quarantined", poisoned=True)
    verdict = verdict_of(store, tmp_path, done, failed)
    assert verdict.sound
    assert verdict.states == {"succeeded": 1, "failed: request_quarantined": 1}
    failed.poisoned, failed.struck = False, 2
    assert verdict_of(store, tmp_path, done, failed).sound


@pytest.mark.parametrize("wrong", ["missing", "open", "twice", "made twice", "failed", "expired", "survived", "hasty"])
def test_what_is_wrong_is_not_sound(store: JobStore, tmp_path: Path, wrong: str) -> None:
    done = accepted(id=published(store), state="succeeded", sha256="0")
    jobs = [done]
    if wrong == "missing":
        jobs.append(accepted(id="job_2", key="other", state="succeeded"))
    elif wrong == "open":
        jobs.append(accepted(id=store.submit(new_job(idempotency_key="o"))[0].id, key="o"))
    elif wrong == "twice":
        with store._database.transaction() as (connection, _):
            connection.exec_driver_sql(
                "INSERT INTO job_events SELECT job_id, 9, at, state, attempt, reason FROM job_events "
                "WHERE state = 'succeeded'"
            )
    elif wrong == "made twice":
        jobs = [accepted(id="job_other", key="k", state="succeeded")]
    elif wrong == "survived":
        done.poisoned = True
    elif wrong == "hasty":  # one fault does not take so many attempts
        done.state, done.code, done.struck = "failed", "request_quarantined", 1
    elif wrong == "failed":
        done.state, done.code = "failed", "internal_error"
    else:
        done.state = "expired"
    assert not verdict_of(store, tmp_path, *jobs).sound


def test_the_report_has_a_row_for_each_kind_and_says_what_was_not_noticed(store: JobStore, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"fault": 0, "kind": "rank", "met": 3, "met_running": 1, "served_s": 5.0, "settled_s": 6.0},
        {"fault": 1, "kind": "rank", "met": 2, "met_running": 1, "served_s": 7.0, "settled_s": 9.0},
        {"fault": 2, "kind": "proxy", "trouble": "not noticed: there is no proxy"},
        {"fault": 3, "kind": "rank", "met": 1, "served_s": 90.0, "settled_s": 90.0, "beside": "store full"},
        {"fault": 4, "kind": "store full", "served_s": 80.0, "settled_s": 90.0, "beside": "rank"},
        json.loads(json.dumps(vars(verdict_of(store, tmp_path, accepted())))),
    ]
    said = report(lines, ["gang"])
    assert "| rank | 3 | 3 | 1 | 6 | 2 | 6.0 s | 7.0 s | 7.5 s | 9.0 s |" in said
    assert "| proxy | 1 | 0 | 0 |" in said and "| gang | 0 | 0 | 0 |" in said
    assert "5 faults of 3 kinds, 2 of them in pairs" in said
    assert "- fault 2, proxy: not noticed: there is no proxy" in said
    assert "Accepted 1, ended 0" in said
    assert "1 lost" in said
    assert "not in the store" in said


def test_a_link_that_is_cut_for_a_process_holds_what_it_sends(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / SOCKET))
        server.listen()
        link = Link(SimpleNamespace(url=f"postgresql://test@/postgres?host={tmp_path}"))  # type: ignore[arg-type]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(Path(link.url.rpartition("host=")[2]) / SOCKET))
            reached, _ = server.accept()
            reached.settimeout(0.3)
            link.cut(os.getpid() + 1)  # another one
            client.sendall(b"a")
            assert reached.recv(9) == b"a"
            link.cut(os.getpid())
            client.sendall(b"b")
            with pytest.raises(TimeoutError):
                reached.recv(9)
            assert link.held == 1
            link.heal()
            reached.settimeout(10)
            assert reached.recv(9) == b"b"
            link.cut(os.getpid(), answers=True)
            client.sendall(b"c")
            assert reached.recv(9) == b"c"
            reached.sendall(b"d")
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(9)
            link.cut(os.getpid())
            client.close()
            reached.settimeout(0.3)
            with pytest.raises(TimeoutError):  # nobody hears of its end either
                reached.recv(9)
            link.heal()
            reached.settimeout(10)
            assert reached.recv(9) == b""
            reached.close()
        link.close()
