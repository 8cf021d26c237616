"""How many jobs have ended, by model and state: counts that outlive the jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

ENDED = ("succeeded", "failed", "cancelled", "expired")


def upgrade() -> None:
    """Make the table, and count the jobs that are still there."""
    ends = op.create_table(
        "job_ends",
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("state", sa.String, primary_key=True),
        sa.Column("count", sa.BigInteger, nullable=False),
    )
    jobs = sa.table("jobs", sa.column("model", sa.String), sa.column("state", sa.String))
    found = sa.select(jobs.c.model, jobs.c.state, sa.func.count()).where(jobs.c.state.in_(ENDED))
    op.get_bind().execute(sa.insert(ends).from_select(ends.columns.keys(), found.group_by(jobs.c.model, jobs.c.state)))
