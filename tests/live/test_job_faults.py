"""Jobs outlive what fails: the process of the store, the whole cluster, PostgreSQL, the way to it.

The other kinds of faults are in `test_job_strikes.py`. `make soak` does all of it a hundred times, see
`tests.benchmarks.job_faults`.
"""

import hashlib
import os
import random
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.jobs.engines import open_postgres, open_sqlite
from service.jobs.runner import LEASE_S
from service.jobs.store import JobStore
from service.jobs.store_actor import FILE
from tests.benchmarks.job_faults.callers import Callers
from tests.benchmarks.job_faults.cluster import NEAR, Cluster, wait
from tests.benchmarks.job_faults.ledger import Accepted, Ledger
from tests.benchmarks.job_faults.link import Link
from tests.benchmarks.job_faults.scene import Scene
from tests.benchmarks.job_faults.store_strikes import cut_off
from tests.benchmarks.job_faults.verdict import compare_pictures, judge
from tests.support.postgres import Postgres, running_postgres
from tests.support.when import IN_FULL

KILLS = 20
"""About two minutes of them."""

PATIENCE_S = 240.0

LONG = 60
"""Steps of a job that takes seconds."""

JOBS = 6
"""More than two gateways take at once for one gang."""


ON_SQLITE = pytest.param("sqlite", marks=pytest.mark.soak)
ON_POSTGRES = pytest.param("postgres", marks=pytest.mark.fault)


@dataclass
class Served:
    """A cluster, and what keeps its jobs.

    Attributes:
        cluster: that is served.
        postgres: a server; None: SQLite.
        link: by which gateways reach it.
    """

    cluster: Cluster
    postgres: Postgres | None
    link: Link | None


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One cluster for all tests on the same store."""
    with running_postgres() if request.param == "postgres" else nullcontext() as postgres:
        link = Link(postgres) if postgres else None
        cluster = Cluster(tmp_path_factory.mktemp("jobs"), jobs_url=link.url if link else None)
        try:
            cluster.start()
            yield Served(cluster, postgres, link)
        finally:
            cluster.stop()
            if link is not None:
                link.close()


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


@pytest.mark.parametrize("served", [ON_POSTGRES], indirect=True)
def test_postgres_stops_and_starts(served: Served, tmp_path: Path) -> None:
    """Submissions are refused meanwhile; what runs goes on, and is published later by the same attempt."""
    cluster, server = served.cluster, served.postgres
    assert server is not None
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


@pytest.mark.parametrize("served", [pytest.param("postgres", marks=IN_FULL)], indirect=True)
def test_a_job_of_a_gateway_that_is_cut_off_has_one_result(served: Served, tmp_path: Path) -> None:
    """Another one takes it over, and the first one speaks of it again later."""
    assert served.postgres is not None
    callers = callers_of(served.cluster, tmp_path, steps=20)
    scene = Scene(served.cluster, callers, random.Random(0), postgres=served.postgres, link=served.link)
    facts = cut_off(scene)
    callers.end()
    with closing(JobStore(open_postgres(served.postgres.url), 3600.0)) as store:
        verdict = judge(callers.ledger, store, callers.refused, compare_pictures(callers.ledger, callers))
    print(f" {facts['taken_over']} taken over, {facts['messages_late']} messages late: {verdict.states};", end="")
    assert verdict.sound, verdict
    assert verdict.drawn_again > 0
    taken = [callers.ledger.jobs[job_id] for job_id in facts["taken_over"]]
    assert {(job.state, job.attempt) for job in taken} == {("succeeded", 2)}


@pytest.mark.parametrize("served", [ON_POSTGRES, ON_SQLITE], indirect=True)
def test_a_whole_cluster_restarts_with_its_jobs(served: Served, tmp_path: Path) -> None:
    cluster = served.cluster
    callers = callers_of(cluster, tmp_path, LONG)
    callers.burst(JOBS)
    until_accepted(callers, JOBS)
    until_one_runs(callers)
    states = {job.state for job in callers.ledger.open_jobs()}
    before = set(cluster.kill())
    assert states == {"queued", "running"}
    cluster.start()
    assert not before & set(cluster.processes())
    callers.end()
    ended = callers.ledger.jobs.values()
    assert [(job.state, job.trouble) for job in ended] == [("succeeded", "")] * JOBS
    assert {job.attempt for job in ended} == {1, 2}, "those that ran were queued again"
    for job in ended:
        picture = callers.draw(job)
        assert picture is not None
        assert hashlib.sha256(picture).hexdigest() == job.sha256


@pytest.mark.parametrize("served", [ON_SQLITE], indirect=True)
def test_what_is_acknowledged_while_the_store_is_killed_ends(served: Served, tmp_path: Path) -> None:
    cluster = served.cluster
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
