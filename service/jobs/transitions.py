"""What becomes of a job: one change and its event, and what ends or returns without a word of its runner.

Called by `service.jobs.store` and `service.jobs.leases` with an open transaction and rows that it has locked;
`count_ends` by `service.jobs.database` at the transaction's end.
"""

from collections import Counter
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.jobs import outbox
from service.jobs.queries import is_due
from service.jobs.records import (
    DEADLINE,
    ENDED,
    MAX_ATTEMPTS,
    MOST_LEASE_S,
    QUARANTINED,
    UNSERVED,
    Job,
    JobError,
    NewJob,
    State,
)
from service.jobs.tables import Row, ends, events, jobs, to_job

SETTLED_AT_ONCE = 100
"""Jobs that one transaction settles, so that none is long."""

ENDS = "ends of jobs"
"""What a connection knows of its transaction: how many jobs it has ended, by model and state."""

INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
"""By database: an insert that may meet a row."""


def accepted(new: NewJob, now: float) -> Job:
    """The record of a new job."""
    return Job(
        id=new.id,
        kind=new.kind,
        model=new.model,
        owner=new.owner,
        request=new.request,
        work=new.work,
        priority=new.priority,
        state="queued",
        created_at=now,
        deadline_at=None if new.deadline_s is None else now + new.deadline_s,
        idempotency_key=new.idempotency_key,
        fingerprint=new.fingerprint,
        webhook_url=new.webhook_url,
    )


def change(connection: sa.Connection, row: Row, now: float, reason: str = "", **values: Any) -> Job:
    """Change columns of a job, and note it among its events.

    Args:
        connection: in a transaction.
        row: the job as it is, locked.
        now: seconds since the epoch.
        reason: for the event.
        values: what changes, by column. An ended job gets its times by itself, from `keep_s`.
    """
    if values["state"] in ENDED:
        values |= {"ended_at": now, "expires_at": now + values.pop("keep_s"), "lease_until": None}
        connection.info.setdefault(ENDS, Counter())[row["model"], values["state"]] += 1
    (changed,) = connection.execute(
        sa.update(jobs).where(jobs.c.id == row["id"]).values(**values).returning(jobs)
    ).mappings()
    note(connection, changed, now, reason)
    if changed["state"] in ENDED and changed["webhook_url"] is not None:
        outbox.add(connection, changed, now)
    return to_job(changed)


def count_ends(connection: sa.Connection) -> None:
    """Add the jobs that this transaction has ended to those before. Its last statements, in the same order everywhere:
    so no two transactions wait for each other's counts."""
    for (model, state), count in sorted(connection.info.pop(ENDS, {}).items()):
        adds = INSERTS[connection.dialect.name](ends).values(model=model, state=state, count=count)
        more = {"count": ends.c.count + adds.excluded.count}
        connection.execute(adds.on_conflict_do_update(index_elements=["model", "state"], set_=more))


def note(connection: sa.Connection, row: Row, now: float, reason: str) -> None:
    """Append an event: the state that the job has now."""
    before = sa.select(sa.func.coalesce(sa.func.max(events.c.number), 0)).where(events.c.job_id == row["id"])
    number = connection.execute(before).scalar_one() + 1
    values = {"job_id": row["id"], "number": number, "at": now, "state": row["state"], "attempt": row["attempt"]}
    connection.execute(sa.insert(events).values(**values, reason=reason))


def end(
    connection: sa.Connection, row: Row, now: float, keep_s: float, state: State, error: JobError, **values: Any
) -> Job:
    """End a job without a result."""
    return change(connection, row, now, error.message, state=state, error=asdict(error), keep_s=keep_s, **values)


def queue_again(connection: sa.Connection, row: Row, now: float, reason: str, **values: Any) -> Job:
    """Let a job wait for its next attempt, in the place that it had."""
    values = {"lease_until": None, "step": 0, "total_steps": 0} | values
    return change(connection, row, now, reason, state="queued", **values)


def settle(connection: sa.Connection, now: float, keep_s: float) -> int:
    """End jobs whose deadline has passed while they waited, and queue again those whose runner is silent.

    Returns:
        How many. If it is `SETTLED_AT_ONCE`, there may be more.
    """
    late = sa.and_(jobs.c.state == "queued", jobs.c.deadline_at <= now)
    silent = sa.and_(jobs.c.state == "running", is_due(jobs.c.lease_until, now, MOST_LEASE_S))
    rows: list[Row] = []
    for found in (late, silent):  # two queries: each has an index
        query = sa.select(jobs).where(found).limit(SETTLED_AT_ONCE - len(rows)).with_for_update(skip_locked=True)
        rows += connection.execute(query).mappings().all()
    for row in rows:
        _settle(connection, row, now, keep_s)
    return len(rows)


def _settle(connection: sa.Connection, row: Row, now: float, keep_s: float) -> None:
    if row["deadline_at"] is not None and row["deadline_at"] <= now:
        end(connection, row, now, keep_s, "expired", JobError(DEADLINE, "the job did not end before its deadline"))
    elif row["attempt"] >= MAX_ATTEMPTS:
        said = f"{MAX_ATTEMPTS} attempts ended without a result, the last one without a word; it is not tried again"
        end(connection, row, now, keep_s, "failed", JobError(QUARANTINED, said))
    else:
        queue_again(connection, row, now, "its runner was not heard of anymore")


def is_served(connection: sa.Connection, model: str, now: float, lately_s: float) -> bool:
    """Whether a job of a model runs, or was begun in the last `lately_s` seconds."""
    begun = sa.or_(jobs.c.state == "running", jobs.c.started_at > now - lately_s)
    return connection.execute(sa.select(jobs.c.id).where(jobs.c.model == model, begun).limit(1)).first() is not None


def end_unserved(connection: sa.Connection, model: str, now: float, keep_s: float, after_s: float) -> int:
    """End jobs that have waited for a model for so many seconds, unless one of its jobs runs or was begun since.

    Where several clusters share the database, one of them may serve a model that the others do not have. As long as
    jobs of it wait, that cluster begins one after the other.

    Returns:
        How many. If it is `SETTLED_AT_ONCE`, there may be more.
    """
    if is_served(connection, model, now, after_s):
        return 0
    waits = jobs.c.model == model, jobs.c.state == "queued", jobs.c.created_at <= now - after_s
    query = sa.select(jobs).where(*waits).limit(SETTLED_AT_ONCE).with_for_update(skip_locked=True)
    rows = connection.execute(query).mappings().all()
    said = f"the deployment has no model {model!r} anymore, and had none for {after_s / 60:g} minutes"
    for row in rows:
        end(connection, row, now, keep_s, "failed", JobError(UNSERVED, said, "model"))
    return len(rows)
