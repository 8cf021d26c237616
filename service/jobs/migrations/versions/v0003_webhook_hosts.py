"""The hosts of the calls that have to be made, so that each is called by a few at once.

An older version that still runs adds calls without a host; these are bound by no host's limit.
"""

import sqlalchemy as sa
from alembic import op

from service.jobs.outbox import host_of

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column, fill it in, and let an index find what is due of a host."""
    op.add_column("webhooks", sa.Column("host", sa.String, nullable=False, server_default=""))
    calls = sa.table("webhooks", sa.column("id", sa.String), sa.column("url", sa.String), sa.column("host", sa.String))
    connection = op.get_bind()
    for call_id, url in connection.execute(sa.select(calls.c.id, calls.c.url)).all():
        connection.execute(sa.update(calls).where(calls.c.id == call_id).values(host=host_of(url)))
    op.create_index("webhooks_of_host", "webhooks", ["host", "not_before"])
