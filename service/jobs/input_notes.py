"""Which files jobs begin with, as rows. Each is noted before it is written, so whatever is left without a job is found,
also after a crash, and no folder or bucket has to be listed: others may keep files there, too.

For `service.jobs.store`. A note outlives its job, and ends when its file is gone. What lies in no file is a row, too,
which ends with its job.
"""

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from service.jobs.tables import input_data, inputs, jobs
from service.jobs.transitions import INSERTS


def note(connection: sa.Connection, job_id: str, names: Sequence[str], now: float) -> None:
    """See `JobStore.note_inputs`."""
    rows = [{"name": name, "job_id": job_id, "at": now} for name in names]
    connection.execute(INSERTS[connection.dialect.name](inputs).values(rows).on_conflict_do_nothing())


def stray(connection: sa.Connection, before: float, most: int) -> list[str]:
    """See `JobStore.stray_inputs`."""
    kept = sa.exists().where(jobs.c.id == inputs.c.job_id)
    query = sa.select(inputs.c.name).where(inputs.c.at <= before, ~kept).order_by(inputs.c.at).limit(most)
    return list(connection.execute(query).scalars())


def forget(connection: sa.Connection, names: Sequence[str]) -> None:
    """See `JobStore.forget_inputs`."""
    connection.execute(sa.delete(inputs).where(inputs.c.name.in_(names)))


def add_data(connection: sa.Connection, job_id: str, data: Sequence[bytes]) -> None:
    """Keep what a job begins with."""
    if data:
        rows = [{"job_id": job_id, "number": number, "data": each} for number, each in enumerate(data)]
        connection.execute(sa.insert(input_data), rows)


def data_of(connection: sa.Connection, job_id: str) -> Mapping[int, bytes]:
    """See `JobStore.input_data`."""
    query = sa.select(input_data.c.number, input_data.c.data).where(input_data.c.job_id == job_id)
    return {number: bytes(data) for number, data in connection.execute(query)}
