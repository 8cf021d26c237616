"""Jobs and their events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make both tables."""
    identity = sa.String().with_variant(sa.String(collation="C"), "postgresql")
    op.create_table(
        "jobs",
        sa.Column("id", identity, primary_key=True),
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
        sa.Column("error", sa.JSON),
        sa.Column("outputs", sa.JSON, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("warnings", sa.JSON, nullable=False),
        sa.Column("idempotency_key", sa.String),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),
    )
    op.create_index("jobs_queue", "jobs", ["state", "model", "order_at", "id"])
    op.create_index("jobs_backlog", "jobs", ["state", "model", "work"])
    op.create_index("jobs_of_owner", "jobs", ["owner", "id"])
    op.create_index("jobs_leases", "jobs", ["state", "lease_until"])
    op.create_index("jobs_deadlines", "jobs", ["state", "deadline_at"])
    op.create_index("jobs_expiry", "jobs", ["expires_at"])
    op.create_table(
        "job_events",
        sa.Column("job_id", identity, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
    )
