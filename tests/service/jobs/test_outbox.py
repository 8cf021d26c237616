"""Webhooks that have to be sent, as the store keeps them, on both databases."""

import json
from typing import Any

import pytest

from service.jobs import engines
from service.jobs.outbox import KEEP_S
from service.jobs.store import JobStore
from service.jobs.webhooks import LEASE_S
from tests.service.jobs.stores import FILM, Clock, new_job, take


def end(store: JobStore, clock: Clock, how: str) -> Any:
    """A job with a webhook that ends so; its id."""
    job, _ = store.submit(new_job(webhook_url="https://hooks.example.com/", deadline_s=5.0))
    if how == "cancelled":
        store.cancel(job.id, None)
        return job.id
    if how == "expired":
        clock.now += 5
        store.sweep()
        return job.id
    (held,) = take(store)
    if how == "succeeded":
        store.publish(job.id, held.fence, [FILM], {})
    else:
        store.lose_gang(job.id, held.fence, 2, "rank 0 died")
    return job.id


@pytest.mark.parametrize("how", ["succeeded", "failed", "cancelled", "expired"])
def test_every_end_is_told_and_outlives_the_job(store: JobStore, clock: Clock, how: str) -> None:
    store.submit(new_job())  # of which nobody wants to hear
    store.cancel(store.page(None).jobs[0].id, None)
    job_id = end(store, clock, how)
    clock.now += 2000
    store.sweep()
    assert store.page(None).jobs == ()
    (delivery,) = store.due_webhooks(10, LEASE_S)
    told = json.loads(delivery.body)
    assert (told["type"], told["data"]["id"], delivery.attempt) == (f"job.{how}", job_id, 1)
    assert delivery.url == "https://hooks.example.com/"


def test_a_lease_holds_back_others_until_it_ends(store: JobStore, clock: Clock) -> None:
    end(store, clock, "succeeded")
    (first,) = store.due_webhooks(10, LEASE_S)
    assert store.due_webhooks(10, LEASE_S) == []
    clock.now += LEASE_S
    (second,) = store.due_webhooks(10, LEASE_S)
    assert (second.id, second.body, second.attempt) == (first.id, first.body, 2)
    assert store.webhook_not_sent(first, 0.0)  # of an attempt that lasted too long: it says nothing
    assert store.due_webhooks(10, LEASE_S) == []
    assert store.webhook_not_sent(second, 7.0)
    clock.now += 6.9
    assert store.due_webhooks(10, LEASE_S) == []
    clock.now += 0.1
    (third,) = store.due_webhooks(10, LEASE_S)
    store.webhook_sent(third.id)
    clock.now += KEEP_S
    assert store.due_webhooks(10, LEASE_S) == []


def test_a_host_with_many_calls_leaves_room_for_others(store: JobStore, clock: Clock) -> None:
    def told_of(host: str, count: int) -> None:
        for _ in range(count):
            clock.now += 1
            job, _ = store.submit(new_job(webhook_url=f"https://{host}/"))
            store.cancel(job.id, None)

    told_of("SLOW.example.com:8443", 5)
    told_of("quick.example.com", 1)
    told_of("removed.example.com", 2)
    taken = store.due_webhooks(10, LEASE_S, {"slow.example.com": 2, "quick.example.com": 2})
    hosts = [delivery.url.split("/")[2] for delivery in taken]
    assert sorted(hosts) == [*["SLOW.example.com:8443"] * 2, "quick.example.com"]
    assert store.due_webhooks(10, LEASE_S, {"slow.example.com": 0}) == []
    assert len(store.due_webhooks(2, LEASE_S, {"slow.example.com": 3})) == 2


def test_a_host_that_only_others_call_is_left_to_them_for_a_day(store: JobStore, clock: Clock) -> None:
    """Clusters that share a database have lists of their own, and so has each version of an upgrade."""
    ours, theirs = {"other.example.com": 8}, {"hooks.example.com": 8}
    end(store, clock, "failed")
    assert store.due_webhooks(9, LEASE_S, ours) == []
    (found,) = store.due_webhooks(9, LEASE_S, theirs)
    assert store.webhook_not_sent(found, 7200.0)
    clock.now += KEEP_S - 1
    assert store.give_up_webhooks(ours) == 0
    clock.now += 1
    store.sweep()
    assert store.give_up_webhooks(theirs) == 0, "whoever may call gets one more attempt, however long all was away"
    assert store.due_webhooks(9, LEASE_S, ours) == []
    assert store.give_up_webhooks(ours) == 1
    assert store.due_webhooks(9, LEASE_S) == []


def test_calls_of_an_older_version_get_their_hosts(store: JobStore, clock: Clock) -> None:
    end(store, clock, "failed")
    engine = store._database._engine
    with engine.begin() as connection:
        for statement in (
            "DROP TABLE job_inputs", "DROP TABLE job_input_data", "DROP TABLE job_ends",
            "DROP INDEX webhooks_of_host", "ALTER TABLE webhooks DROP COLUMN host",
            "UPDATE alembic_version SET version_num = '0002'",
        ):  # fmt: skip
            connection.exec_driver_sql(statement)
    with engine.begin() as connection:
        engines._migrate(connection)
        connection.exec_driver_sql(  # one that the older version adds while it still runs
            "INSERT INTO webhooks (id, job_id, url, body, created_at, not_before, attempt) "
            "SELECT 'msg_old', job_id, url, body, created_at, not_before, attempt FROM webhooks"
        )
        found = connection.exec_driver_sql("SELECT id, host FROM webhooks").all()
    assert sorted(host for _, host in found) == ["", "hooks.example.com"]
    assert store.due_webhooks(9, LEASE_S, {"hooks.example.com": 0}) == []
    assert len(store.due_webhooks(9, LEASE_S, {"hooks.example.com": 9})) == 2


def test_after_a_day_it_is_given_up(store: JobStore, clock: Clock) -> None:
    end(store, clock, "failed")
    attempts, began = 0, clock.now
    while found := store.due_webhooks(1, LEASE_S):
        attempts += 1
        if not store.webhook_not_sent(found[0], 4 * 3600.0):
            break
        clock.now += 4 * 3600.0
    assert (attempts, clock.now - began) == (6, 20 * 3600.0)
    clock.now += 10 * KEEP_S
    assert store.due_webhooks(1, LEASE_S) == []
