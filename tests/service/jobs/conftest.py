"""Fixtures of the job store's tests: one PostgreSQL for the session, and each test on both databases."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs.store import JobStore
from tests.service.jobs.stores import BACKENDS, Clock, open_store
from tests.support.postgres import Postgres, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server for all tests."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def clock() -> Clock:
    """Of the store."""
    return Clock()


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[JobStore]:
    """An empty store."""
    url = request.getfixturevalue("postgres").url if request.param == "postgres" else ""
    yield from open_store(request.param, tmp_path, url, clock)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a runner wait for nothing."""
    for name in ("runner.RENEW_S", "runner.AGAIN_S", "results.AWAY_S"):
        monkeypatch.setattr(f"service.jobs.{name}", 0.0)
    monkeypatch.setattr("service.jobs.runner.PERIOD_S", 0.05)
