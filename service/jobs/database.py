"""Transactions of the job store, with the time in them. For `service.jobs.store` and `service.jobs.leases`."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import sqlalchemy as sa

from service.jobs.transitions import ENDS, count_ends, settle
from workers.errors import JobsUnavailable

logger = logging.getLogger("ray.serve")

PATIENCE_S = 5.0
"""After the database was away, runners have so long to be heard of before their leases count."""

UNAVAILABLE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError)
"""The server is away or stopping, the disk is full, or no connection came free."""


CLAIMING = 7_207_735_117
"""The lock in PostgreSQL by which one gateway at a time claims jobs; any number that others do not use."""

CLAIMING_S = 10
"""Seconds for which a gateway that stops in the middle of a claim holds up others; PostgreSQL then ends its session."""


def one_claims(connection: sa.Connection) -> None:
    """Wait until no other transaction claims jobs: what it takes is not seen before it ends. SQLite has one writer."""
    if connection.dialect.name == "postgresql":
        limit = sa.func.set_config("idle_in_transaction_session_timeout", f"{CLAIMING_S}s", True)  # this transaction's
        connection.execute(sa.select(limit, sa.func.pg_advisory_xact_lock(CLAIMING)))


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Let what a database that is away raises be `JobsUnavailable`; its own words stay in the log."""
    try:
        yield
    except UNAVAILABLE as error:
        logger.warning("the store of jobs cannot be used: %s", error)
        raise JobsUnavailable("the store of jobs cannot be used now; try again later") from None


class Database:
    """One database of jobs.

    Args:
        engine: from `service.jobs.engines`.
        clock: seconds since the epoch; None: PostgreSQL's own clock, or that of this process.
        patience_s: see `PATIENCE_S`.
    """

    def __init__(self, engine: sa.Engine, clock: Callable[[], float] | None, patience_s: float) -> None:
        self._engine = engine
        self._clock = clock
        self._patience_s = patience_s
        self._sound_since = time.monotonic()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[tuple[sa.Connection, float]]:
        """A transaction, and the time: seconds since the epoch. It is on disk when the block has ended.

        Raises:
            JobsUnavailable: the database is away or cannot write; nothing was changed, or nobody can tell.
        """
        try:
            with answering(), self._engine.begin() as connection:
                connection.info.pop(ENDS, None)  # of a transaction before that was rolled back
                yield connection, self._now(connection)
                count_ends(connection)
        except JobsUnavailable:
            self._sound_since = time.monotonic()
            raise

    def settle(self, connection: sa.Connection, now: float, keep_s: float) -> None:
        """See `service.jobs.transitions.settle`. Nothing is done just after an outage: no runner could renew then."""
        if time.monotonic() - self._sound_since >= self._patience_s:
            settle(connection, now, keep_s)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def _now(self, connection: sa.Connection) -> float:
        if self._clock is not None:
            return self._clock()
        if connection.dialect.name == "sqlite":
            return time.time()
        return float(connection.execute(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))).scalar_one())
