"""What the store of jobs promises to those who submit, look and cancel, on both databases."""

import dataclasses
import json

import pytest

from service.jobs.records import HEAD_START_S, ID, Counts, KeyReused, LeaseLost, new_id
from service.jobs.store import JobStore
from tests.service.jobs.stores import FILM, LEASE_S, Clock, new_job, take
from workers.errors import JobNotFound


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
