"""What the store of jobs promises, on both databases."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from service.jobs import engines
from service.jobs.engines import open_postgres, open_sqlite
from service.jobs.records import HEAD_START_S, ID, Counts, JobError, KeyReused, LeaseLost, new_id
from service.jobs.store import JobStore
from service.jobs.tables import metadata
from service.jobs.transitions import end
from tests.service.jobs.stores import BACKENDS, BROKEN, FILM, KEEP_S, LEASE_S, Clock, new_job, open_engine, take
from tests.support.postgres import Postgres
from workers.errors import JobNotFound, JobsUnavailable


def test_a_job_is_what_was_submitted(store: JobStore, clock: Clock) -> None:
    odd = {"prompt": "a\x00cup \ud800 🍵 'x'; --", "seed": 2**53 - 1, "loras": [["ink", 0.1]], "deadline_at": None}
    new = new_job(request=odd, priority="batch", deadline_s=60.0, work=2**60)
    job, fresh = store.submit(new)
    assert fresh
    assert store.submit(new) == (job, True)
    found = store.get(job.id, "ann")
    assert found == job
    assert json.loads(json.dumps(dict(found.request))) == odd
    assert (found.state, found.deadline_at, found.work) == ("queued", clock.now + 60, 2**60)


def test_ids_sort_by_age_and_look_alike() -> None:
    ids = [new_id() for _ in range(3)]
    assert all(ID.fullmatch(each) for each in ids)
    assert len(set(ids)) == 3
    assert ids[0][:16] <= ids[2][:16]


def test_nobody_sees_jobs_of_others(store: JobStore) -> None:
    job, _ = store.submit(new_job(owner="ann"))
    for call in (store.get, store.cancel, store.delete):
        with pytest.raises(JobNotFound):
            call(job.id, "bob")
    assert store.page("bob").jobs == ()
    assert store.get(job.id, None) == job
    assert store.page(None).jobs == (job,)


def test_a_job_runs_and_is_published(store: JobStore, clock: Clock) -> None:
    job, _ = store.submit(new_job())
    clock.now += 1
    (held,) = take(store, runner="gateway-1")
    assert (held.id, held.state, held.attempt, held.runner) == (job.id, "running", 1, "gateway-1")
    assert held.lease_until == clock.now + LEASE_S
    clock.now += 1
    renewed = store.renew(job.id, held.fence, LEASE_S, 3, 8)
    assert (renewed.step, renewed.total_steps, renewed.lease_until) == (3, 8, clock.now + LEASE_S)
    done = store.publish(job.id, held.fence, [FILM], {"layout": "1 rank"}, ["cut"], steps=8)
    assert (done.state, done.outputs, done.metrics, done.warnings) == (
        "succeeded",
        (FILM,),
        {"layout": "1 rank"},
        ("cut",),
    )
    assert (done.step, done.ended_at, done.expires_at, done.lease_until) == (8, clock.now, clock.now + 1000, None)
    assert store.publish(job.id, held.fence, [], {}) == done
    assert [(event.number, event.state) for event in store.events(job.id)] == [
        (1, "queued"),
        (2, "running"),
        (3, "succeeded"),
    ]
    assert store.events(job.id, after=2)[0].state == "succeeded"


def test_nobody_claims_twice_nor_more_than_it_has_room_for(store: JobStore) -> None:
    ids = {store.submit(new_job(model=model))[0].id for model in ("film", "film", "film", "draw", "other")}
    first = store.claim({"film": 2, "draw": 5, "absent": 3}, "r", LEASE_S)
    assert sorted(job.model for job in first) == ["draw", "film", "film"]
    assert store.claim({"film": 2}, "another", LEASE_S) == []  # as many as may run do, wherever
    second = store.claim({"film": 4, "other": 0}, "another", LEASE_S)
    assert [job.model for job in second] == ["film"]
    assert len({job.id for job in first + second} & ids) == 4


def test_an_old_attempt_can_change_nothing(store: JobStore, clock: Clock) -> None:
    job, _ = store.submit(new_job())
    (old,) = take(store)
    clock.now += LEASE_S
    (new,) = take(store)
    assert (new.id, new.attempt) == (old.id, 2)
    before = store.get(job.id, None)
    calls: list[Any] = [
        lambda: store.publish(job.id, old.fence, [FILM], {}),
        lambda: store.renew(job.id, old.fence, LEASE_S, 1, 8),
        lambda: store.fail(job.id, old.fence, BROKEN),
        lambda: store.give_back(job.id, old.fence, "stops"),
        lambda: store.try_again(job.id, old.fence, BROKEN),
        lambda: store.lose_gang(job.id, old.fence, 1, "gone"),
    ]
    for call in calls:
        with pytest.raises(LeaseLost):
            call()
    assert store.get(job.id, None) == before
    assert store.publish(job.id, new.fence, [FILM], {}).state == "succeeded"


def test_the_leases_of_a_runner_that_is_gone_end_at_once(store: JobStore) -> None:
    jobs = [store.submit(new_job())[0] for _ in range(3)]
    (gone,), (stays,) = take(store, runner="gone"), take(store, runner="stays")
    assert sorted(store.runners()) == ["gone", "stays"]
    store.end_leases("gone")
    store.sweep()
    assert store.runners() == ["stays"]
    assert [store.get(job.id, None).state for job in jobs] == ["queued", "running", "queued"]
    with pytest.raises(LeaseLost):
        store.publish(gone.id, gone.fence, [FILM], {})
    store.renew(stays.id, stays.fence, LEASE_S, 1, 4)


def test_a_lease_holds_until_it_ends(store: JobStore, clock: Clock) -> None:
    store.submit(new_job())
    (held,) = take(store)
    clock.now += LEASE_S - 0.1
    store.renew(held.id, held.fence, LEASE_S, 1, 8)
    clock.now += LEASE_S - 0.1
    assert take(store) == []
    clock.now += 0.1
    assert take(store)[0].fence == held.fence + 1


def test_the_third_silent_attempt_is_the_last(store: JobStore, clock: Clock) -> None:
    job, _ = store.submit(new_job())
    for attempt in (1, 2, 3):
        assert take(store)[0].attempt == attempt
        clock.now += LEASE_S
    assert take(store) == []
    found = store.get(job.id, None)
    assert found.error is not None
    assert (found.state, found.error.code) == ("failed", "request_quarantined")


def test_a_job_costs_two_gangs_at_most(store: JobStore, clock: Clock) -> None:
    job, _ = store.submit(new_job())
    (first,) = take(store)
    assert [store.lose_gang(job.id, first.fence, 1, "rank 0 died").state for _ in range(2)] == ["running"] * 2
    clock.now += LEASE_S
    (second,) = take(store)
    found = store.lose_gang(job.id, second.fence, 2, "rank 1 died")
    assert found.error is not None
    assert (found.state, found.gang_losses, found.error.code) == ("failed", 2, "request_quarantined")
    assert "rank 1 died" in found.error.message


def test_what_was_not_begun_does_not_count(store: JobStore, clock: Clock) -> None:
    store.submit(new_job())
    for _ in range(5):
        (held,) = take(store)
        assert held.attempt == 1
        store.give_back(held.id, held.fence, "the gateway stops", after_s=2.0)
        assert take(store) == []
        clock.now += 2


def test_what_may_pass_is_tried_three_times(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    states = [store.try_again(held.id, held.fence, BROKEN).state for _ in range(3) for held in take(store)]
    assert states == ["queued", "queued", "failed"]
    assert store.get(job.id, None).error == BROKEN


def test_interactive_work_overtakes_and_age_beats_it(store: JobStore, clock: Clock) -> None:
    batch, _ = store.submit(new_job(priority="batch"))
    clock.now += 100
    standard, _ = store.submit(new_job(priority="standard"))
    clock.now += 1
    interactive, _ = store.submit(new_job(priority="interactive"))
    wanted = [interactive.id, standard.id, batch.id]
    assert [store.look(job_id, None)[1] for job_id in wanted] == [1, 2, 3]
    clock.now += 600  # whoever comes so late does not overtake
    late, _ = store.submit(new_job(priority="interactive"))
    assert [job.id for job in take(store, 4)] == [*wanted, late.id]
    assert store.look(late.id, None)[1] == 0


def test_batch_does_not_starve_behind_a_stream_of_interactive_work(store: JobStore, clock: Clock) -> None:
    batch, _ = store.submit(new_job(priority="batch"))
    began, taken = clock.now, ""
    while taken != batch.id:
        store.submit(new_job(priority="interactive"))
        (held,) = take(store)
        store.publish(taken := held.id, held.fence, [], {})
        clock.now += 60  # as long as a job takes
        assert clock.now - began <= HEAD_START_S["batch"] + 120
    assert clock.now - began > HEAD_START_S["batch"]


def test_a_deadline_ends_what_waits_and_what_is_silent(store: JobStore, clock: Clock) -> None:
    waits, _ = store.submit(new_job(deadline_s=10.0))
    runs, _ = store.submit(new_job(model="draw", deadline_s=10.0))
    take(store, model="draw")
    clock.now += 10
    assert take(store) == []
    assert store.get(waits.id, None).state == "expired"
    assert store.get(runs.id, None).state == "running"  # whoever runs it sees to it
    clock.now += LEASE_S
    store.sweep()
    found = store.get(runs.id, None)
    assert found.error is not None
    assert (found.state, found.error.code) == ("expired", "deadline_exceeded")


def test_a_failure_is_kept_and_a_deadline_is_none(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    (held,) = take(store)
    assert store.fail(job.id, held.fence, BROKEN).error == BROKEN
    assert store.get(job.id, None).state == "failed"
    other, _ = store.submit(new_job())
    (held,) = take(store)
    assert store.fail(other.id, held.fence, JobError("deadline_exceeded", "late")).state == "expired"


@pytest.mark.parametrize("running", [False, True])
def test_a_cancelled_job_stays_cancelled(store: JobStore, running: bool) -> None:
    job, _ = store.submit(new_job())
    held = take(store)[0] if running else None
    assert store.cancel(job.id, "ann").state == "cancelled"
    assert store.cancel(job.id, "ann").state == "cancelled"
    assert len(store.events(job.id)) == (3 if running else 2)
    assert take(store) == []
    if held is not None:
        with pytest.raises(LeaseLost):
            store.publish(job.id, held.fence, [FILM], {})


def test_a_deleted_job_is_gone_with_its_events(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    (held,) = take(store)
    assert store.delete(job.id, "ann").id == job.id
    assert store.events(job.id) == []
    for call in (store.get, store.cancel, store.delete):
        with pytest.raises(JobNotFound):
            call(job.id, "ann")
    with pytest.raises(LeaseLost):
        store.renew(job.id, held.fence, LEASE_S, 1, 8)


def test_the_same_key_is_the_same_job(store: JobStore) -> None:
    keyed = new_job(idempotency_key="k", fingerprint="f")
    job, _ = store.submit(keyed)
    keyed = dataclasses.replace(keyed, id=new_id())
    assert store.submit(keyed) == (job, False)
    with pytest.raises(KeyReused, match=job.id):
        store.submit(dataclasses.replace(keyed, fingerprint="other"))
    other, fresh = store.submit(dataclasses.replace(keyed, owner="bob", id=new_id()))
    assert fresh
    assert other.id != job.id
    assert store.submit(new_job())[1] and store.submit(new_job())[1]


def test_a_list_is_paged_also_past_a_job_that_was_deleted(store: JobStore, clock: Clock) -> None:
    ids = []
    for number in range(7):
        ids.append(store.submit(new_job(kind="image" if number % 2 else "video"))[0].id)
        clock.now += 0.01
    newest = store.page("ann", limit=3)
    assert ([job.id for job in newest.jobs], newest.has_more) == (ids[:3:-1], True)
    store.delete(ids[4], None)
    rest = store.page("ann", after=ids[4], limit=9)
    assert ([job.id for job in rest.jobs], rest.has_more) == (ids[3::-1], False)
    assert [job.id for job in store.page("ann", after=ids[1], limit=2, ascending=True).jobs] == ids[2:4]
    assert [job.id for job in store.page(None, kind="image").jobs] == ids[5::-2]
    take(store)
    assert len(store.page("ann", state="running").jobs) == 1


def test_counts_are_by_model(store: JobStore) -> None:
    for model in ("film", "film", "film", "draw"):
        store.submit(new_job(model=model, work=2**50))
    (held,) = take(store)
    found = store.counts()
    assert (found["film"].queued, found["film"].running, found["film"].queued_work) == (2, 1, 2**51)
    assert (found["draw"].queued, found["draw"].running) == (1, 0)
    store.publish(held.id, held.fence, [FILM], {})
    assert store.counts()["film"].running == 0


def test_what_would_come_before_a_new_job(store: JobStore, clock: Clock) -> None:
    for priority in ("interactive", "standard", "batch", "batch"):
        store.submit(new_job(priority=priority, work=2**60))
    store.submit(new_job(model="other"))
    found = {priority: store.ahead("film", priority) for priority in HEAD_START_S}
    assert {priority: each.queued for priority, each in found.items()} == {"interactive": 1, "standard": 2, "batch": 4}
    assert found["batch"].queued_work == 2**62
    clock.now += 600
    assert store.ahead("film", "interactive").queued == 4
    assert store.ahead("nothing", "batch") == Counts()


def test_what_has_ended_expires(store: JobStore, clock: Clock) -> None:
    done, _ = store.submit(new_job())
    waits, _ = store.submit(new_job(model="draw"))
    store.cancel(done.id, None)
    clock.now += 999
    store.sweep()
    assert store.get(done.id, None).ended
    clock.now += 1
    store.sweep()
    with pytest.raises(JobNotFound):
        store.get(done.id, None)
    assert store.get(waits.id, None).state == "queued"


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


def test_jobs_of_a_model_that_nobody_has_end_but_not_where_another_cluster_runs_them(
    store: JobStore, clock: Clock
) -> None:
    first, _ = store.submit(new_job())
    (held,) = take(store)
    waiting, _ = store.submit(new_job())
    other, _ = store.submit(new_job("other"))
    clock.now += 100
    assert store.end_unserved("film", 60) == 0  # one of them runs
    store.publish(first.id, held.fence, [FILM], {})
    assert store.end_unserved("film", 101) == 0  # one was begun not long ago
    late, _ = store.submit(new_job())
    assert store.end_unserved("film", 60) == 1
    ended = store.get(waiting.id, None)
    assert (ended.state, ended.error and (ended.error.code, ended.error.param)) == (
        "failed", ("model_not_found", "model"),
    )  # fmt: skip
    assert {store.get(job.id, None).state for job in (late, other)} == {"queued"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_migrations_make_the_tables_that_the_code_uses(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres").url if backend == "postgres" else ""
    engine = open_engine(backend, tmp_path, url)
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        engines._migrate(connection)  # once more changes nothing
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all() == ["0005"]
    engine.dispose()


def test_ends_of_jobs_are_counted_once_and_outlive_jobs_and_gateways(store: JobStore, clock: Clock) -> None:
    for _ in range(2):
        store.submit(new_job())
        (job,) = take(store)
        store.publish(job.id, job.fence, [FILM], {})
        store.publish(job.id, job.fence, [FILM], {})  # told again: the first answer was lost
    left, _ = store.submit(new_job("draw"))
    store.cancel(left.id, None)
    store.cancel(left.id, None)
    expected = {("film", "succeeded"): 2, ("draw", "cancelled"): 1}
    assert store.ended() == expected
    clock.now += 10 * KEEP_S
    store.sweep()
    assert store.page(None).jobs == () and store.ended() == expected
    again = JobStore(store._database._engine, KEEP_S, clock)  # another gateway, or a later one
    assert again.ended() == expected


def test_what_is_rolled_back_has_not_ended(store: JobStore) -> None:
    store.submit(new_job())
    (job,) = take(store)
    with pytest.raises(ValueError), store._held(job.id, job.fence) as (connection, row, now):
        end(connection, row, now, KEEP_S, "failed", BROKEN)
        raise ValueError
    assert store.ended() == {}
    store.fail(job.id, job.fence, BROKEN)
    assert store.ended() == {("film", "failed"): 1}


def test_jobs_that_had_ended_before_they_were_counted_are_counted(store: JobStore) -> None:
    store.submit(new_job())
    (job,) = take(store)
    store.fail(job.id, job.fence, BROKEN)
    store.submit(new_job())
    with store._database._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE job_ends")
        connection.exec_driver_sql("DROP TABLE job_inputs")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0003'")
    with store._database._engine.begin() as connection:
        engines._migrate(connection)
    assert store.ended() == {("film", "failed"): 1}


def test_sqlite_writes_through_and_its_file_is_private(tmp_path: Path) -> None:
    engine = open_sqlite(tmp_path / "folder" / "jobs.db")
    with engine.begin() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
    engine.dispose()
    assert found == {"journal_mode": "wal", "synchronous": 2}
    assert (tmp_path / "folder" / "jobs.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("url", "said"), [("mysql://a:secret@b/c", "'mysql'"), ("secret", "cannot be read")])
def test_other_urls_are_refused_without_their_secrets(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as found:
        open_postgres(url)
    assert "secret" not in str(found.value)


def test_a_store_that_is_away_says_so_and_comes_back(postgres: Postgres, tmp_path: Path) -> None:
    store = JobStore(open_engine("postgres", tmp_path, postgres.url), 60.0)
    job, _ = store.submit(new_job())
    postgres.stop()
    try:
        with pytest.raises(JobsUnavailable):
            store.submit(new_job())
    finally:
        postgres.start()
    assert store.page(None).jobs == (job,)
    assert store.submit(new_job())[1]
    store.close()


def test_a_full_disk_is_no_acknowledgement(tmp_path: Path) -> None:
    engine = open_sqlite(tmp_path / "jobs.db")
    store = JobStore(engine, 60.0)
    job, _ = store.submit(new_job())
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(JobsUnavailable):
        for _ in range(50):
            store.submit(new_job(request={"prompt": "x" * 32_000}))
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=100000")
    assert job in store.page(None, limit=100).jobs
    assert store.submit(new_job())[1]
    store.close()
