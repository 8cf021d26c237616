"""The tables of the job store, and records as rows. `migrations/` makes these tables; a test compares the two.

For `service.jobs.store`. Both databases have the same columns. `order_at` is `created_at` with the head start of the
others: the queue is sorted by a number that never changes, so an index finds who is next.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from service.jobs.records import Job, JobError, JobOutput

Row = Mapping[Any, Any]
"""The columns of a job, by name."""

metadata = sa.MetaData()

Id = sa.String().with_variant(sa.String(collation="C"), "postgresql")
"""Sorted byte by byte, whatever the language of the database."""

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("owner", sa.String, nullable=False),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("work", sa.BigInteger, nullable=False),
    sa.Column("priority", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("order_at", sa.Double, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("ended_at", sa.Double),
    sa.Column("deadline_at", sa.Double),
    sa.Column("expires_at", sa.Double),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("gang_losses", sa.Integer, nullable=False),
    sa.Column("runner", sa.String, nullable=False),
    sa.Column("lease_until", sa.Double),
    sa.Column("not_before", sa.Double, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("total_steps", sa.Integer, nullable=False),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("outputs", sa.JSON, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("warnings", sa.JSON, nullable=False),
    sa.Column("idempotency_key", sa.String),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("webhook_url", sa.String),
    sa.UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),
    sa.Index("jobs_queue", "state", "model", "order_at", "id"),
    sa.Index("jobs_backlog", "state", "model", "work"),
    sa.Index("jobs_of_owner", "owner", "id"),
    sa.Index("jobs_leases", "state", "lease_until"),
    sa.Index("jobs_deadlines", "state", "deadline_at"),
    sa.Index("jobs_expiry", "expires_at"),
)

events = sa.Table(
    "job_events",
    metadata,
    sa.Column("job_id", Id, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
)


webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("job_id", Id, nullable=False),
    sa.Column("url", sa.String, nullable=False),
    sa.Column("body", sa.String, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("not_before", sa.Double, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("host", sa.String, nullable=False, server_default=""),
    sa.Index("webhooks_due", "not_before"),
    sa.Index("webhooks_of_host", "host", "not_before"),
)

ends = sa.Table(
    "job_ends",
    metadata,
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("state", sa.String, primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
)
"""Jobs that have ended since the store was made, also those that are forgotten."""

inputs = sa.Table(
    "job_inputs",
    metadata,
    sa.Column("name", Id, primary_key=True),
    sa.Column("job_id", Id, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Index("job_inputs_at", "at"),
)
"""Files that jobs begin with; a file may be here before its job, and after it."""

input_data = sa.Table(
    "job_input_data",
    metadata,
    sa.Column("job_id", Id, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
"""What jobs begin with, if it lies in no files. It is big: in the job's row it would be moved at each look and step."""


def to_row(job: Job, order_at: float) -> dict[str, Any]:
    """The columns of a job."""
    row = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    row |= {"error": job.error and dataclasses.asdict(job.error), "order_at": order_at}
    row |= {"outputs": [dataclasses.asdict(output) for output in job.outputs], "warnings": list(job.warnings)}
    return row | {"request": dict(job.request), "metrics": dict(job.metrics)}


def to_job(row: Row) -> Job:
    """The job of a row."""
    values = {field.name: row[field.name] for field in dataclasses.fields(Job)}
    values["error"] = JobError(**row["error"]) if row["error"] else None
    values["outputs"] = tuple(JobOutput(**output) for output in row["outputs"])
    values["warnings"] = tuple(row["warnings"])
    return Job(**values)
