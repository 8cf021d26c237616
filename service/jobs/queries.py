"""How jobs are found: one query each. For `service.jobs.store` and `service.jobs.leases`, whose methods say what comes
out."""

from collections.abc import Collection

import sqlalchemy as sa

from service.jobs.records import MOST_PAUSE_S, Counts, Job, JobEvent, Kind, NewJob, Page, State
from service.jobs.tables import Row, ends, events, jobs, to_job
from workers.errors import JobNotFound


def find(connection: sa.Connection, job_id: str, owner: str | None, lock: bool = False) -> Row:
    """A job of an owner; None: of anybody.

    Raises:
        JobNotFound: there is none. Nobody hears of other people's jobs.
    """
    query = sa.select(jobs).where(jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
    if row is None or (owner is not None and row["owner"] != owner):
        raise JobNotFound(f"there is no job {job_id!r} of yours, or not anymore")
    return row


def held(job_id: str, fence: int, or_done: bool = False) -> tuple[sa.ColumnElement[bool], ...]:
    """The condition under which an attempt may change its job; or has published it."""
    states = ("running", "succeeded") if or_done else ("running",)
    return jobs.c.id == job_id, jobs.c.fence == fence, jobs.c.state.in_(states)


def same(connection: sa.Connection, new: NewJob) -> Job | None:
    """The job that is there, or that the same idempotency key has brought."""
    conditions = [jobs.c.id == new.id]
    if new.idempotency_key is not None:
        conditions.append(sa.and_(jobs.c.owner == new.owner, jobs.c.idempotency_key == new.idempotency_key))
    for condition in conditions:  # two queries: each has an index
        row = connection.execute(sa.select(jobs).where(condition)).mappings().one_or_none()
        if row is not None:
            return to_job(row)
    return None


def is_due(column: sa.ColumnElement[float], now: float, most_s: float) -> sa.ColumnElement[bool]:
    """Whether a time has come; also if it is further ahead than anybody sets it, because the clock was set back."""
    return sa.or_(column <= now, column > now + most_s)


def next_in_line(connection: sa.Connection, model: str, most: int, now: float) -> list[Row]:
    """Jobs of a model whose turn it is, locked; those that another gateway is about to take are passed over."""
    query = (
        sa.select(jobs)
        .where(jobs.c.state == "queued", jobs.c.model == model, is_due(jobs.c.not_before, now, MOST_PAUSE_S))
        .where(sa.or_(jobs.c.deadline_at.is_(None), jobs.c.deadline_at > now))
        .order_by(jobs.c.order_at, jobs.c.id)
        .limit(max(0, most))
        .with_for_update(skip_locked=True)
    )
    return list(connection.execute(query).mappings())


def running(connection: sa.Connection, model: str, strangers: Collection[str]) -> int:
    """How many jobs of a model run, in whatever gateway but these."""
    query = sa.select(sa.func.count()).where(jobs.c.state == "running", jobs.c.model == model)
    query = query.where(jobs.c.runner.not_in(strangers)) if strangers else query
    return int(connection.execute(query).scalar_one())


def runners(connection: sa.Connection) -> list[str]:
    """Who runs jobs."""
    query = sa.select(jobs.c.runner).where(jobs.c.state == "running").distinct()
    return list(connection.execute(query).scalars())


def page(
    connection: sa.Connection,
    owner: str | None,
    kind: Kind | None,
    state: State | None,
    after: str | None,
    limit: int,
    ascending: bool,
) -> Page:
    """See `JobStore.page`."""
    query = sa.select(jobs).order_by(jobs.c.id.asc() if ascending else jobs.c.id.desc()).limit(limit + 1)
    for column, wanted in ((jobs.c.owner, owner), (jobs.c.kind, kind), (jobs.c.state, state)):
        query = query if wanted is None else query.where(column == wanted)
    if after is not None:
        query = query.where(jobs.c.id > after if ascending else jobs.c.id < after)
    found = [to_job(row) for row in connection.execute(query).mappings()]
    return Page(tuple(found[:limit]), len(found) > limit)


def events_after(connection: sa.Connection, job_id: str, after: int) -> list[JobEvent]:
    """See `JobStore.events`."""
    columns = (events.c.number, events.c.at, events.c.state, events.c.attempt, events.c.reason)
    query = sa.select(*columns).where(events.c.job_id == job_id, events.c.number > after).order_by(events.c.number)
    return [JobEvent(*row) for row in connection.execute(query)]


def position(connection: sa.Connection, job: Job) -> int:
    """The place of a job that waits among those of its model, 1 for the next one."""
    order_at = sa.select(jobs.c.order_at).where(jobs.c.id == job.id).scalar_subquery()
    before = sa.or_(jobs.c.order_at < order_at, sa.and_(jobs.c.order_at == order_at, jobs.c.id < job.id))
    query = sa.select(sa.func.count()).where(jobs.c.state == "queued", jobs.c.model == job.model, before)
    return int(connection.execute(query).scalar_one()) + 1


def counts(connection: sa.Connection) -> dict[str, Counts]:
    """See `JobStore.counts`."""
    waiting = sa.case((jobs.c.state == "queued", 1), else_=0)
    query = (
        sa.select(jobs.c.model, sa.func.sum(waiting), sa.func.count(), sa.func.sum(waiting * jobs.c.work))
        .where(jobs.c.state.in_(("queued", "running")))
        .group_by(jobs.c.model)
    )
    rows = connection.execute(query).all()
    return {model: Counts(int(queued), int(both - queued), int(work)) for model, queued, both, work in rows}


def ended(connection: sa.Connection) -> dict[tuple[str, State], int]:
    """See `JobStore.ended`."""
    return {(model, state): count for model, state, count in connection.execute(sa.select(ends))}


def ahead(connection: sa.Connection, model: str, order_at: float) -> Counts:
    """The jobs of a model that wait and come before one of this place."""
    found = (jobs.c.state == "queued", jobs.c.model == model, jobs.c.order_at <= order_at)
    query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(jobs.c.work), 0)).where(*found)
    count, work = connection.execute(query).one()
    return Counts(queued=int(count), queued_work=int(work))
