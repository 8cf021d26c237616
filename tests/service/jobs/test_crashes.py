"""Processes that submit and claim at once, and processes that are killed while they submit."""

import contextlib
import itertools
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.jobs import database
from service.jobs.engines import open_postgres, open_sqlite
from service.jobs.store import JobStore
from tests.service.jobs.stores import BACKENDS, LEASE_S, new_job, open_engine
from tests.support.postgres import Postgres
from workers.errors import JobsUnavailable

KILLS = 20
ROUNDS = 30
FORK = multiprocessing.get_context("fork")  # each imports nothing, so that most of the time they submit


def opened(where: str) -> JobStore:
    """A store on an existing database, as another process opens it."""
    return JobStore(open_postgres(where) if where.startswith("postgresql") else open_sqlite(Path(where)), 60.0)


def claim_all(where: str, together: Barrier, told: Connection) -> None:
    """Claim, always at the same moment as the other process, with room for two more in each round; tell the ids."""
    store = opened(where)
    rounds: list[list[str]] = []
    for number in range(ROUNDS):
        together.wait(60)
        rounds.append([job.id for job in store.claim({"film": 2 * (number + 1)}, "r", LEASE_S)])
    told.send(rounds)


def submit_for_ever(where: str, told: Connection) -> None:
    """Submit jobs; tell the id of each that was acknowledged."""
    store = opened(where)
    while True:
        told.send(store.submit(new_job())[0].id)


@pytest.fixture(params=BACKENDS)
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The place of an empty database: a file, or a URL."""
    url = request.getfixturevalue("postgres").url if request.param == "postgres" else ""
    engine = open_engine(request.param, tmp_path, url)
    engine.dispose()
    name = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return str(engine.url.database) if request.param == "sqlite" else name


def test_two_processes_claim_no_job_twice_and_no_more_than_there_is_room_for(where: str) -> None:
    store = opened(where)
    ids = {store.submit(new_job())[0].id for _ in range(3 * ROUNDS)}
    together, pipes = FORK.Barrier(2), [FORK.Pipe(duplex=False) for _ in range(2)]
    processes = [FORK.Process(target=claim_all, args=(where, together, theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    rounds = [[*one, *other] for one, other in zip(*(ours.recv() for ours, _ in pipes), strict=True)]
    ran = list(itertools.accumulate(len(taken) for taken in rounds))
    assert ran == [2 * (number + 1) for number in range(ROUNDS)], "more than there was room for, or fewer"
    claimed = list(itertools.chain(*rounds))
    assert len(set(claimed)) == len(claimed) and set(claimed) <= ids
    store.close()


def test_a_gateway_that_stops_in_the_middle_of_a_claim_does_not_hold_up_the_others(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine("postgres", tmp_path, postgres.url)
    store = JobStore(engine, 60.0)
    job, _ = store.submit(new_job())
    monkeypatch.setattr(database, "IDLE_S", 2)  # not less: a busy machine may stand still for a second
    with pytest.raises(JobsUnavailable), store._database.transaction() as (stopped, _):
        database.one_claims(stopped)
        assert [taken.id for taken in store.claim({"film": 1}, "r", LEASE_S)] == [job.id]
        stopped.execute(sa.select(1))
    assert "idle-in-transaction" in caplog.text
    store.close()


def test_what_was_acknowledged_exists_after_twenty_kills(where: str) -> None:
    acknowledged: list[str] = []
    for kill in range(KILLS):
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=submit_for_ever, args=(where, theirs))
        process.start()
        theirs.close()
        acknowledged += [ours.recv() for _ in range(1 + kill % 5)]
        process.kill()
        with contextlib.suppress(EOFError):  # what was told before the kill was acknowledged, too
            while True:
                acknowledged.append(ours.recv())
        process.join()
    store = opened(where)
    found = {job.id for job in store.page(None, limit=100_000).jobs}
    assert len(acknowledged) >= KILLS
    assert set(acknowledged) <= found
    assert all(len(store.events(job_id)) == 1 for job_id in found), "a job without its event is half a submission"
    store.close()
