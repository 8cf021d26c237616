"""Where jobs tell of their end, and the calls that have to be made."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column, and make the table."""
    identity = sa.String().with_variant(sa.String(collation="C"), "postgresql")
    op.add_column("jobs", sa.Column("webhook_url", sa.String))
    op.create_table(
        "webhooks",
        sa.Column("id", identity, primary_key=True),
        sa.Column("job_id", identity, nullable=False),
        sa.Column("url", sa.String, nullable=False),
        sa.Column("body", sa.String, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("not_before", sa.Double, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
    )
    op.create_index("webhooks_due", "webhooks", ["not_before"])
