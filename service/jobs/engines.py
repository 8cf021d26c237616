"""The two databases of jobs: a file of SQLite, or PostgreSQL. For `service.jobs.store` and its actor.

An engine comes out whose tables are up to date, and whose every transaction is on disk when it has ended.
"""

import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext, MigrationStep
from alembic.script import ScriptDirectory

from service.jobs.bounded import CONNECT_S, OVER_TCP, connect

MIGRATIONS = Path(__file__).with_name("migrations")

BUSY_S = 30.0
"""How long a connection of SQLite waits for another one's transaction."""

CONNECTIONS = 4
"""Of one gateway to PostgreSQL."""

MIGRATING = 7_207_735_116
"""The lock in PostgreSQL by which one gateway at a time changes the tables; any number that others do not use."""


def open_sqlite(file: Path) -> sa.Engine:
    """A database in a file of a local disk, made if it is not there. One process should own it.

    Raises:
        OSError: the folder cannot be made.
        sqlalchemy.exc.DBAPIError: the file is no database, or cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o600)  # prompts are nobody else's business
    os.close(descriptor)
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(file)),
        pool_size=1,
        max_overflow=0,
        connect_args={"timeout": BUSY_S},
        hide_parameters=True,  # errors are logged, and prompts should not be
    )
    sa.event.listen(engine, "connect", _set_up_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    with engine.begin() as connection:
        _migrate(connection)
    return engine


def _set_up_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # else the driver begins transactions by itself, and too late
    # FULL, since in WAL mode anything less may lose commits when the power goes.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # a transaction that reads first could not write later


def open_postgres(url: str) -> sa.Engine:
    """A database of PostgreSQL 12 or later.

    Args:
        url: `postgresql://user:password@host/database`, and perhaps parameters of libpq, which come before `OVER_TCP`.
            It is not repeated in errors.

    Raises:
        ValueError: it is no URL of PostgreSQL.
        sqlalchemy.exc.DBAPIError: the server cannot be reached, or refuses.
    """
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # a port that is no number
        raise ValueError(
            "the URL of the job store cannot be read; give postgresql://user:password@host/database"
        ) from None
    if parsed.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise ValueError(f"the job store is PostgreSQL, got a URL of {parsed.drivername!r}; give postgresql://...")
    engine = sa.create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        pool_size=CONNECTIONS,
        max_overflow=0,
        pool_pre_ping=True,  # the server may have been restarted
        pool_timeout=CONNECT_S,
        # Statements prepared in one session are unknown to the next one that a pooler gives.
        connect_args={name: value for name, value in OVER_TCP.items() if name not in parsed.query}
        | {"prepare_threshold": None},
        hide_parameters=True,
    )
    sa.event.listen(engine, "do_connect", connect)
    with engine.begin() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATING)))
        _migrate(connection)
    return engine


def _migrate(connection: sa.Connection) -> None:
    """Make the tables, or change those of an older version."""
    scripts = ScriptDirectory(str(MIGRATIONS))

    def steps(done: Any, context: MigrationContext) -> list[MigrationStep]:
        missing = list(scripts.iterate_revisions("heads", done or "base"))
        return [MigrationStep.upgrade_from_script(scripts.revision_map, each) for each in reversed(missing)]

    context = MigrationContext.configure(connection, opts={"fn": steps})
    with Operations.context(context):
        context.run_migrations()
