"""What the store of jobs promises to those who run them, on both databases."""

from typing import Any

import pytest

from service.jobs.records import HEAD_START_S, JobError, LeaseLost
from service.jobs.store import JobStore
from service.jobs.transitions import end
from tests.service.jobs.stores import BROKEN, FILM, KEEP_S, LEASE_S, Clock, new_job, take
from workers.errors import JobNotFound


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


@pytest.mark.parametrize(
    ("code", "state"), [("deadline_exceeded", "expired"), ("cancelled", "cancelled"), ("generation_failed", "failed")]
)
def test_an_error_says_how_a_job_has_ended(store: JobStore, code: str, state: str) -> None:
    store.submit(new_job())
    (held,) = take(store)
    assert store.fail(held.id, held.fence, JobError(code, "so it is")).state == state


def test_what_other_clusters_run_takes_no_room_of_this_one(store: JobStore) -> None:
    for _ in range(3):
        store.submit(new_job())
    assert len(store.claim({"film": 1}, "elsewhere", LEASE_S)) == 1
    assert store.claim({"film": 1}, "here", LEASE_S) == []
    assert len(store.claim({"film": 1}, "here", LEASE_S, frozenset({"elsewhere", "another"}))) == 1
    assert store.claim({"film": 1}, "here", LEASE_S, ["elsewhere"]) == []


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


def test_only_jobs_that_wait_change_their_model(store: JobStore) -> None:
    first, _ = store.submit(new_job())
    (held,) = take(store)
    waiting, _ = store.submit(new_job())
    store.rename_model("film", "cinema")
    assert [store.get(job.id, None).model for job in (held, waiting)] == ["film", "cinema"]
    store.publish(first.id, held.fence, [FILM], {})
    assert [job.id for job in store.claim({"cinema": 1, "film": 1}, "r", LEASE_S)] == [waiting.id]


def test_a_model_of_another_cluster_keeps_its_jobs(store: JobStore, clock: Clock) -> None:
    store.submit(new_job())
    take(store)
    waiting, _ = store.submit(new_job())
    clock.now += 10
    assert store.rename_model("film", "cinema", 900) == 0  # one of them runs
    assert store.get(waiting.id, None).model == "film"
    assert store.rename_model("film", "cinema") == 1


def test_a_claim_whose_answer_was_lost_is_queued_again(store: JobStore) -> None:
    ids = [store.submit(new_job())[0].id for _ in range(4)]
    held, lost, begun, others = take(store)[0], take(store)[0], take(store)[0], take(store, runner="another")[0]
    store.renew(begun.id, begun.fence, LEASE_S, 1, 4)
    store.disown("r", [held.id])
    assert [(store.get(job, None).state, store.get(job, None).attempt) for job in ids] == [
        ("running", 1), ("queued", 0), ("queued", 1), ("running", 1),
    ]  # fmt: skip
    with pytest.raises(LeaseLost):
        store.renew(lost.id, lost.fence, LEASE_S, 1, 4)
    store.disown("", [])  # whoever has no name shares it with others
    assert store.renew(others.id, others.fence, LEASE_S, 1, 4).state == "running"


def test_a_clock_that_was_set_back_stops_no_job(store: JobStore, clock: Clock) -> None:
    waits, dead = (store.submit(new_job())[0].id for _ in range(2))
    (held,) = take(store)
    assert held.id == waits
    take(store)
    store.give_back(waits, held.fence, "its model sleeps", 5.0)
    assert store.claim({"film": 9}, "r", LEASE_S) == []
    clock.now -= 3600
    store.sweep()
    assert {store.get(job, None).state for job in (waits, dead)} == {"queued"}
    assert {job.id for job in store.claim({"film": 2}, "r", LEASE_S)} == {waits, dead}


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
