"""Jobs outlive what fails: the process of the store, the whole cluster, PostgreSQL.

`make soak` does this and more a hundred times, see `tests.benchmarks.job_faults`.
"""

import hashlib
import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from service.jobs.engines import open_sqlite
from service.jobs.runner import LEASE_S
from service.jobs.store import JobStore
from service.jobs.store_actor import FILE
from tests.benchmarks.job_faults.callers import Callers
from tests.benchmarks.job_faults.cluster import NEAR, Cluster, wait
from tests.benchmarks.job_faults.ledger import Accepted, Ledger
from tests.benchmarks.job_faults.verdict import judge
from tests.support.postgres import running_postgres

KILLS = 20
PATIENCE_S = 240.0

LONG = 100
"""Steps of a job that takes seconds."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With jobs in SQLite."""
    cluster = Cluster(tmp_path_factory.mktemp("jobs"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def callers_of(cluster: Cluster, folder: Path, steps: int) -> Callers:
    return Callers(lambda: cluster.url, Ledger(folder / "jobs.jsonl"), cluster.models, PATIENCE_S, steps)


def until_one_runs(callers: Callers) -> Accepted:
    """A job that runs, or has run at the last look."""

    def running() -> list[Accepted]:
        return [job for job in callers.ledger.open_jobs() if job.state == "running"]

    assert wait(60, running), "no job runs"
    return running()[0]


def until_accepted(callers: Callers, jobs: int) -> None:
    assert wait(60, lambda: len(callers.ledger.jobs) >= jobs), "nothing is accepted"


def kill_store(cluster: Cluster) -> None:
    """Return when there is another one."""
    (pid,) = cluster.find("store")
    os.kill(pid, signal.SIGKILL)
    assert wait(60, lambda: cluster.find("store") - {pid}), "the store is not started again"


@pytest.mark.fault
def test_a_whole_cluster_restarts_with_its_jobs(cluster: Cluster, tmp_path: Path) -> None:
    callers = callers_of(cluster, tmp_path, LONG)
    callers.burst(4)
    running = until_one_runs(callers)
    until_accepted(callers, 4)
    queued = [job for job in callers.ledger.open_jobs() if job.state == "queued"]
    before = set(cluster.kill())
    assert queued, "some wait"
    cluster.start()
    assert not before & set(cluster.processes())
    callers.end()
    ended = callers.ledger.jobs.values()
    assert [(job.state, job.trouble) for job in ended] == [("succeeded", "")] * 4
    assert running.attempt == 2, "it was queued again"
    for job in ended:
        picture = callers.draw(job)
        assert picture is not None
        assert hashlib.sha256(picture).hexdigest() == job.sha256


@pytest.mark.soak
def test_what_is_acknowledged_while_the_store_is_killed_ends(cluster: Cluster, tmp_path: Path) -> None:
    callers = callers_of(cluster, tmp_path, steps=1)
    callers.begin(6)  # they submit all the time
    assert wait(60, lambda: cluster.find("store")), "the first job starts the store"
    for _ in range(KILLS):
        until_accepted(callers, len(callers.ledger.jobs) + 2)
        kill_store(cluster)
    callers.end()
    with closing(JobStore(open_sqlite(cluster.store / FILE), 3600.0)) as store:
        verdict = judge(callers.ledger, store, callers.refused, (0, []))
    print(f" {KILLS} kills, {verdict.accepted} accepted: {verdict.states};", end="")
    assert verdict.sound, verdict
    assert verdict.accepted >= 2 * KILLS


@pytest.mark.fault
def test_postgres_stops_and_starts(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Submissions are refused meanwhile; what runs goes on, and is published later by the same attempt."""
    with running_postgres() as server:
        cluster = Cluster(tmp_path_factory.mktemp("postgres"), jobs_url=server.url)
        try:
            cluster.start()
            callers = callers_of(cluster, tmp_path, LONG)
            callers.burst(1)
            running = until_one_runs(callers)
            server.stop()
            stopped_at = time.monotonic()
            refused = callers.post({"model": NEAR, "prompt": "a cup"}, uuid.uuid4().hex)
            assert refused is not None
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "jobs_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            assert wait(60, lambda: len(list(cluster.outputs.glob("*.png"))) == 1), "the work does not go on"
            assert running.open
            server.start()
            assert time.monotonic() - stopped_at < LEASE_S
            callers.end()
            assert (running.state, running.attempt, running.trouble) == ("succeeded", 1, "")
            after = callers_of(cluster, tmp_path, 1).submit()
            assert after is not None
        finally:
            cluster.stop()
