"""What jobs begin with that lies in no files. Jobs of before have theirs in their rows, and keep them there."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Make the table."""
    identity = sa.String().with_variant(sa.String(collation="C"), "postgresql")
    op.create_table(
        "job_input_data",
        sa.Column("job_id", identity, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
