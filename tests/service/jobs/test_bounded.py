"""Calls of a PostgreSQL that does not answer end in time, and nothing is acknowledged or published twice by them."""

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from service.api.rest import rest_app
from service.jobs import bounded, database, store_actor
from service.jobs.bounded import OVER_TCP
from service.jobs.engines import CONNECTIONS, open_postgres
from service.jobs.records import Job, LeaseLost, new_id
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from tests.benchmarks.job_faults.link import Link
from tests.service.jobs.stores import FILM, LEASE_S, Clock, new_job, open_engine, take
from tests.support.backend import FakeBackend
from tests.support.in_process import served
from tests.support.postgres import Postgres
from workers.errors import JobsUnavailable

CALL_S = 2.0
"""While the link is cut; else calls have the time of the product, for a busy machine may stand still for a second."""

LATER_S = 5.0
"""On a busy machine."""

OTHER = dataclasses.replace(FILM, name="b" * 32 + ".mp4", sha256="1" * 64)

pytestmark = pytest.mark.timeout(60)  # a call without an end


@pytest.fixture
def link(postgres: Postgres) -> Iterator[Link]:
    """The way to the server."""
    link = Link(postgres)
    yield link
    link.close()


@pytest.fixture
def direct(postgres: Postgres, tmp_path: Path) -> Iterator[sa.Engine]:
    """A database of the test's own, reached without the link."""
    engine = open_engine("postgres", tmp_path, postgres.url)
    yield engine
    engine.dispose()


@pytest.fixture
def url(direct: sa.Engine, link: Link, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the same database, over the link."""
    host = link.url.rpartition("host=")[2]
    over = direct.url.set(drivername="postgresql").update_query_dict({"host": host})
    said = over.render_as_string(hide_password=False)
    monkeypatch.setenv("JOBS_URL", said)
    return said


@contextlib.contextmanager
def cut(link: Link) -> Iterator[None]:
    """Nobody answers this process, and calls do not wait for it for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded, "CALL_S", CALL_S)
        link.cut(os.getpid())
        yield
    link.heal()


def over_link() -> Jobs:
    """The store as a gateway reaches it."""
    jobs = Jobs()
    jobs.follow(None, "JOBS_URL", 60.0)
    return jobs


def test_a_call_that_nobody_answers_ends_in_time(link: Link, url: str) -> None:
    store = JobStore(open_postgres(url), 60.0)
    job, _ = store.submit(new_job())
    with cut(link):
        for _ in range(2):  # over a connection that was there, and over a new one
            began = time.monotonic()
            with pytest.raises(JobsUnavailable):
                store.get(job.id, None)
            assert time.monotonic() - began < CALL_S + LATER_S
    assert store.get(job.id, None) == job
    store.close()


def test_who_asks_is_told_in_time_also_if_many_ask_and_each_job_is_there_once(link: Link, url: str) -> None:
    news = [new_job(idempotency_key=str(number)) for number in range(4 * CONNECTIONS)]

    async def story() -> None:
        jobs = over_link()
        await jobs.ask(JobStore.submit, news[0])
        with cut(link):
            began = time.monotonic()
            told = await asyncio.gather(*(jobs.ask(JobStore.submit, each) for each in news), return_exceptions=True)
            assert time.monotonic() - began < CALL_S + LATER_S
            assert {type(each) for each in told} == {JobsUnavailable}
        for each in news:
            await jobs.ask(JobStore.submit, dataclasses.replace(each, id=new_id()))
        kept = (await jobs.ask(JobStore.page, None, limit=100)).jobs
        assert sorted(job.idempotency_key or "" for job in kept) == sorted(each.idempotency_key or "" for each in news)
        assert jobs._own is not None
        jobs._own.close()

    asyncio.run(story())


def test_a_submission_is_refused_with_503_within_seconds(link: Link, url: str) -> None:
    backend = FakeBackend()
    backend.jobs.follow(None, "JOBS_URL", 60.0)
    body = {"model": "one", "prompt": "a cup", "seed": 7}
    with (
        served(rest_app(backend)) as address,
        httpx.Client(base_url=f"{address}/v1", trust_env=False, timeout=60) as client,
    ):

        def submit() -> httpx.Response:
            return client.post(
                "/images/generations", json=body, headers={"prefer": "respond-async", "idempotency-key": "k"}
            )

        job = submit()
        assert job.status_code == 202
        with cut(link):
            began = time.monotonic()
            refused = submit()
            assert time.monotonic() - began < CALL_S + store_actor.GRACE_S + LATER_S
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "jobs_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
        again = submit()
        assert (again.status_code, again.json()["id"]) == (202, job.json()["id"])


@pytest.mark.parametrize("arrives", [True, False], ids=["the answer is lost", "the commit is late"])
def test_a_result_is_published_once_whatever_becomes_of_its_commit(
    link: Link, direct: sa.Engine, url: str, arrives: bool
) -> None:
    clock = Clock()
    near, far = (JobStore(engine, 60.0, clock, patience_s=0.0) for engine in (open_postgres(url), direct))
    job, _ = near.submit(new_job())
    (held,) = take(near)
    cuts = [link]

    def cut_off(_: sa.Connection) -> None:
        if cuts:
            cuts.pop().cut(os.getpid(), answers=arrives)

    sa.event.listen(near._database._engine, "commit", cut_off)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(JobsUnavailable):
        patch.setattr(bounded, "CALL_S", 2 * CALL_S)
        patch.setattr(database, "IDLE_S", CALL_S)
        near.publish(job.id, held.fence, [FILM], {})
    assert not cuts
    assert far.get(job.id, None).state == ("succeeded" if arrives else "running")
    if not arrives:  # what was cut off holds the job no longer than PostgreSQL lets it
        clock.now += LEASE_S
        other = taken_over(far)
        assert (other.id, other.attempt) == (job.id, 2)
        far.publish(job.id, other.fence, [OTHER], {})
    link.heal()  # all that was held arrives
    if arrives:
        assert near.publish(job.id, held.fence, [FILM], {}).outputs == (FILM,)
    else:
        with pytest.raises(LeaseLost):
            near.publish(job.id, held.fence, [FILM], {})
    done = far.get(job.id, None)
    assert (done.state, done.outputs) == ("succeeded", (FILM,) if arrives else (OTHER,))
    assert [event.state for event in far.events(job.id)].count("succeeded") == 1
    near.close()


def taken_over(store: JobStore) -> Job:
    """The job, as soon as its row is not locked anymore."""
    until = time.monotonic() + 30
    while not (taken := take(store)):
        assert time.monotonic() < until, "the job is locked by a gateway that is cut off"
        time.sleep(0.05)
    return taken[0]


def test_the_kernel_gives_up_connections_that_nobody_answers_on(url: str) -> None:
    engine = open_postgres(url + "&keepalives_idle=77")
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, bounded.BoundedConnection)
        given = driver.info.get_parameters()
    engine.dispose()
    expected = {name: str(value) for name, value in OVER_TCP.items()} | {"keepalives_idle": "77"}
    assert {name: given[name] for name in OVER_TCP} == expected
