"""When leases count: not just after nobody could be heard."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from service.jobs.store import JobStore
from tests.service.jobs.stores import BACKENDS, LEASE_S, Clock, new_job, open_engine, take
from workers.errors import JobsUnavailable


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_an_outage_leases_count_only_when_runners_could_renew(
    backend: str, tmp_path: Path, clock: Clock, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = request.getfixturevalue("postgres").url if backend == "postgres" else ""
    now = 50.0
    monkeypatch.setattr("service.jobs.database.time.monotonic", lambda: now)
    store = JobStore(open_engine(backend, tmp_path, url), 60.0, clock, patience_s=5.0)
    now = 60.0
    store.submit(new_job())
    (held,) = take(store)
    clock.now += LEASE_S
    with pytest.raises(JobsUnavailable), store._database.transaction():
        raise sa.exc.OperationalError("", {}, OSError("the server went away"))
    assert take(store) == []
    assert store.renew(held.id, held.fence, LEASE_S, 1, 8).attempt == 1
    now = 65.0
    clock.now += LEASE_S
    assert take(store)[0].attempt == 2
    store.close()
