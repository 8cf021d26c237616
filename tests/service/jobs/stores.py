"""Both databases of jobs for tests, empty each time, with a clock that stands still."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from service.jobs.engines import open_postgres, open_sqlite
from service.jobs.records import Counts, Job, JobError, JobOutput, NewJob
from service.jobs.store import JobStore

BACKENDS = ("sqlite", "postgres")
KEEP_S = 1000.0
LEASE_S = 30.0
FILM = JobOutput("a" * 32 + ".mp4", "mp4", 3, "0" * 64, 7)
BROKEN = JobError("generation_failed", "rank 1: MemoryError")


class Clock:
    """Seconds since the epoch, which only a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def new_job(model: str = "film", owner: str = "ann", **changes: Any) -> NewJob:
    """A job as it is submitted."""
    values: dict[str, Any] = {"kind": "video", "request": {"prompt": "a cup", "seed": 7}, "work": 10} | changes
    return NewJob(model=model, owner=owner, **values)


def open_engine(backend: str, folder: Path, url: str) -> sa.Engine:
    """An engine on an empty database of its own."""
    if backend == "sqlite":
        return open_sqlite(folder / f"{uuid.uuid4().hex}.db")
    name = f"t{uuid.uuid4().hex}"
    admin = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return open_postgres(sa.make_url(url).set(database=name).render_as_string(hide_password=False))


def open_store(backend: str, folder: Path, url: str, clock: Clock) -> Iterator[JobStore]:
    """An empty store."""
    store = JobStore(open_engine(backend, folder, url), KEEP_S, clock, patience_s=0.0)
    yield store
    store.close()


def take(store: JobStore, most: int = 1, model: str = "film", runner: str = "r") -> list[Job]:
    """Claim so many jobs of one model, besides those that run."""
    running = store.counts().get(model, Counts()).running
    return store.claim({model: running + most}, runner, LEASE_S)
