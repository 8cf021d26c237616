"""The files that jobs begin with. Jobs of before have theirs in their rows, and keep them there."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the table."""
    identity = sa.String().with_variant(sa.String(collation="C"), "postgresql")
    op.create_table(
        "job_inputs",
        sa.Column("name", identity, primary_key=True),
        sa.Column("job_id", identity, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_index("job_inputs_at", "job_inputs", ["at"])
