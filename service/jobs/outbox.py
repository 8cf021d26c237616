"""Webhooks that have to be sent, as rows. One is added in the transaction that ends its job, so that none is forgotten.

Gateways that share a database may call different hosts, so each takes what it may call and leaves the rest to others.

`service.jobs.transitions` adds them; `service.jobs.webhooks` takes them through `service.jobs.store`. What is sent says
no more than which job has ended and how: its prompt is not kept longer than the job is.
"""

import json
import secrets
from collections.abc import Collection, Mapping
from datetime import UTC, datetime

import httpx
import sqlalchemy as sa

from service.jobs.queries import is_due
from service.jobs.records import Delivery
from service.jobs.tables import Row, webhooks

KEEP_S = 24 * 3600.0
"""After which a webhook is given up."""

MOST_PAUSE_S = 5 * 3600.0
"""More than a webhook ever waits for its next attempt."""

AT_ONCE = 1000
"""Rows that one transaction changes beside those that it takes, so that none is long."""

NO_HOST = "-"
"""Of a URL that is none."""


def add(connection: sa.Connection, job: Row, now: float) -> None:
    """Let a job that has just ended be told of."""
    told = {name: job[name] for name in ("id", "kind", "model", "state", "error", "created_at", "ended_at")}
    at = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = json.dumps({"type": f"job.{job['state']}", "timestamp": at, "data": {"object": "job", **told}})
    row = {"id": f"msg_{secrets.token_hex(16)}", "job_id": job["id"], "url": job["webhook_url"], "body": body}
    row |= {"host": host_of(job["webhook_url"])}
    connection.execute(sa.insert(webhooks).values(**row, created_at=now, not_before=now, attempt=0))


def host_of(url: str) -> str:
    """The host of a URL, in lower case, as `gateway.webhook_hosts` has it; empty: the URL is none."""
    try:
        return httpx.URL(url).raw_host.decode()
    except httpx.InvalidURL:
        return ""


def due(
    connection: sa.Connection, most: int, now: float, lease_s: float, room: Mapping[str, int] | None
) -> list[Delivery]:
    """See `JobStore.due_webhooks`."""
    ids: list[str] = []
    _note_hosts(connection)
    for host, few in (room or {}).items():
        ids += _due_ids(connection, now, min(few, most - len(ids)), webhooks.c.host == host)
    if room is None:
        ids = _due_ids(connection, now, most, sa.true())
    if not ids:
        return []
    change = sa.update(webhooks).where(webhooks.c.id.in_(ids))
    change = change.values(not_before=now + lease_s, attempt=webhooks.c.attempt + 1)
    columns = (webhooks.c.id, webhooks.c.job_id, webhooks.c.url, webhooks.c.body, webhooks.c.attempt)
    return [Delivery(*row) for row in connection.execute(change.returning(*columns))]


def _note_hosts(connection: sa.Connection) -> None:
    """Of what an older version has added while it still runs: it notes no host."""
    query = sa.select(webhooks.c.id, webhooks.c.url).where(webhooks.c.host == "").limit(AT_ONCE)
    for message_id, url in connection.execute(query.with_for_update(skip_locked=True)).all():
        noted = sa.update(webhooks).where(webhooks.c.id == message_id).values(host=host_of(url) or NO_HOST)
        connection.execute(noted)


def _due_ids(connection: sa.Connection, now: float, most: int, which: sa.ColumnElement[bool]) -> list[str]:
    """Of some webhooks those that have been due for the longest, locked."""
    if most <= 0:
        return []
    query = (
        sa.select(webhooks.c.id)
        .where(which, is_due(webhooks.c.not_before, now, MOST_PAUSE_S))
        .order_by(webhooks.c.not_before)
    )
    return list(connection.execute(query.limit(most).with_for_update(skip_locked=True)).scalars())


def sent(connection: sa.Connection, message_id: str) -> None:
    """See `JobStore.webhook_sent`."""
    connection.execute(sa.delete(webhooks).where(webhooks.c.id == message_id))


def give_up(connection: sa.Connection, now: float, hosts: Collection[str]) -> int:
    """See `JobStore.give_up_webhooks`."""
    late = webhooks.c.created_at + KEEP_S <= now, webhooks.c.not_before <= now, webhooks.c.host.not_in(hosts)
    query = sa.select(webhooks.c.id).where(*late).limit(AT_ONCE).with_for_update(skip_locked=True)
    ids = connection.execute(query).scalars().all()
    connection.execute(sa.delete(webhooks).where(webhooks.c.id.in_(ids)))
    return len(ids)


def not_sent(connection: sa.Connection, delivery: Delivery, now: float, after_s: float) -> bool:
    """See `JobStore.webhook_not_sent`."""
    held = webhooks.c.id == delivery.id, webhooks.c.attempt == delivery.attempt
    late = connection.execute(sa.delete(webhooks).where(*held, webhooks.c.created_at + KEEP_S <= now + after_s))
    if late.rowcount:
        return False
    connection.execute(sa.update(webhooks).where(*held).values(not_before=now + after_s))
    return True
