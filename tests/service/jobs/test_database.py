"""When leases count: not just after nobody could be heard."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.jobs.database import LATE_S
from service.jobs.store import JobStore
from tests.service.jobs.stores import BACKENDS, LEASE_S, Clock, new_job, open_engine, take
from workers.errors import JobsUnavailable

PATIENCE_S = 5.0


class Ticks:
    """What `time.monotonic` says."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    ticks = Ticks()
    monkeypatch.setattr("service.jobs.database.time.monotonic", ticks)
    return ticks


@pytest.fixture(params=BACKENDS)
def patient(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock, ticks: Ticks) -> Iterator[JobStore]:
    """A store that was opened a while ago, and was in use all the time."""
    url = request.getfixturevalue("postgres").url if request.param == "postgres" else ""
    store = JobStore(open_engine(request.param, tmp_path, url), 60.0, clock, patience_s=PATIENCE_S)
    pass_time(store, clock, ticks, 2 * PATIENCE_S)
    yield store
    store.close()


def pass_time(store: JobStore, clock: Clock, ticks: Ticks, seconds: float) -> None:
    """Let time pass in which gateways ask every second."""
    end = ticks.now + seconds
    while ticks.now < end:
        clock.now += 1.0
        ticks.now += 1.0
        store.counts()


@pytest.mark.parametrize("outage", ["an error", "a long call", "a standstill", "a clock that is set", "none"])
def test_after_an_outage_leases_count_only_when_runners_could_renew(
    patient: JobStore, clock: Clock, ticks: Ticks, outage: str
) -> None:
    patient.submit(new_job())
    (held,) = take(patient)
    pass_time(patient, clock, ticks, LEASE_S - 1)
    if outage == "a clock that is set":
        clock.now += 3600.0
    else:
        clock.now += 1.0
    if outage == "an error":
        with pytest.raises(JobsUnavailable), patient._database.transaction():
            raise sa.exc.OperationalError("", {}, OSError("the server went away"))
    elif outage == "a long call":
        with patient._database.transaction():
            ticks.now += LATE_S + 1
    elif outage == "a standstill":
        ticks.now += PATIENCE_S + 1
    if outage == "none":
        assert take(patient)[0].attempt == 2
        return
    assert take(patient) == []
    assert patient.renew(held.id, held.fence, LEASE_S, 1, 8).attempt == 1
    pass_time(patient, clock, ticks, LEASE_S + PATIENCE_S)
    assert take(patient)[0].attempt == 2


def test_who_waits_for_the_database_in_the_middle_of_a_call_ends_no_lease(
    patient: JobStore, clock: Clock, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient.submit(new_job())
    (held,) = take(patient)
    pass_time(patient, clock, ticks, LEASE_S)

    def waits(_: sa.Connection) -> None:
        ticks.now += LATE_S + 1

    monkeypatch.setattr("service.jobs.leases.one_claims", waits)
    assert patient.claim({"film": 2}, "r", LEASE_S) == []
    assert patient.renew(held.id, held.fence, LEASE_S, 1, 8).attempt == 1
