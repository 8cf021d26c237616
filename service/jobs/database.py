"""Transactions of the job store, with the time in them. For `service.jobs.store` and `service.jobs.leases`."""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa

from service.jobs import bounded
from service.jobs.transitions import ENDS, count_ends, settle
from workers.errors import JobsUnavailable

logger = logging.getLogger("ray.serve")

PATIENCE_S = 8.0
"""After the database was away, runners have so long to be heard of before their leases count: their reports come every
five seconds at least."""

LATE_S = 3.0
"""Whoever has waited longer for the database assumes that others could not be heard either."""

STEP_S = 2.0
"""By which the time of leases may grow more or less than that of this process between two transactions. Beyond it a
clock was set, or the machine slept: leases may seem to have ended that nobody could renew."""

UNAVAILABLE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError)
"""The server is away, stopping or silent, the disk is full, or no connection came free."""

CLAIMING = 7_207_735_117
"""The lock in PostgreSQL by which one gateway at a time claims jobs; any number that others do not use."""

IDLE_S = 5.0
"""For which a gateway that stops in the middle of a transaction, or is cut off, holds what it has locked; PostgreSQL
then ends its session. Shorter than a call, so that those who wait for the lock get it."""

BEGAN = "began"
"""What a connection knows of its transaction: when it was asked for, by `time.monotonic`."""


def one_claims(connection: sa.Connection) -> None:
    """Wait until no other transaction claims jobs: what it takes is not seen before it ends. SQLite has one writer."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CLAIMING)))


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
        self._sound_since = self._used_at = time.monotonic()
        self._offset: float | None = None  # of the time of leases and that of this process, at the last transaction

    @contextlib.contextmanager
    def transaction(self) -> Iterator[tuple[sa.Connection, float]]:
        """A transaction, and the time: seconds since the epoch. It is on disk when the block has ended.

        On PostgreSQL it ends within `bounded.CALL_S`, also if nobody answers.

        Raises:
            JobsUnavailable: the database is away, silent or cannot write; nothing was changed, or nobody can tell.
        """
        began = time.monotonic()
        if began - self._used_at > self._patience_s:  # this process stood still, and with it all that it hears
            self._sound_since = began
        limit = bounded.until(began + bounded.CALL_S) if self._postgres else contextlib.nullcontext()
        try:
            with limit, answering():
                _in_time()
                with self._engine.begin() as connection:
                    connection.info[BEGAN] = began
                    connection.info.pop(ENDS, None)  # of a transaction before that was rolled back
                    now = self._now(connection)
                    self._note_step(now)
                    yield connection, now
                    count_ends(connection)
                    _in_time()  # whoever asked is told by now that the store does not answer
        except JobsUnavailable:
            self._sound_since = time.monotonic()
            raise
        finally:
            self._used_at = time.monotonic()
        self._note_wait(began)

    def settle(self, connection: sa.Connection, now: float, keep_s: float) -> None:
        """See `service.jobs.transitions.settle`. Nothing is done just after an outage: no runner could renew then."""
        self._note_wait(connection.info[BEGAN])
        if time.monotonic() - self._sound_since >= self._patience_s:
            settle(connection, now, keep_s)

    def disk(self) -> tuple[int, int] | None:
        """Bytes that are free, and in all, where the file of SQLite lies; None: it is PostgreSQL's disk, or cannot be
        asked."""
        if self._postgres or not self._engine.url.database:
            return None
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(Path(self._engine.url.database).parent)
            return usage.free, usage.total
        return None

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def _note_wait(self, began: float) -> None:
        if time.monotonic() - began > LATE_S:
            self._sound_since = time.monotonic()

    def _note_step(self, now: float) -> None:
        before, self._offset = self._offset, now - time.monotonic()
        if before is not None and abs(self._offset - before) > STEP_S:
            self._sound_since = time.monotonic()

    @property
    def _postgres(self) -> bool:
        return self._engine.dialect.name == "postgresql"

    def _now(self, connection: sa.Connection) -> float:
        """The time. On PostgreSQL the same statement limits what follows, by settings that end with the transaction:
        such as a pooler between lets through."""
        if not self._postgres:
            return self._clock() if self._clock is not None else time.time()
        limits = {
            "statement_timeout": bounded.CALL_S,
            "idle_in_transaction_session_timeout": IDLE_S,
            "tcp_user_timeout": bounded.CALL_S,  # for an answer that does not arrive
        }
        settings = (sa.func.set_config(name, str(int(1000 * limit)), True) for name, limit in limits.items())
        found = connection.execute(sa.select(sa.extract("epoch", sa.func.clock_timestamp()), *settings)).one()
        return self._clock() if self._clock is not None else float(found[0])


def _in_time() -> None:
    if bounded.left_s() <= 0:
        raise sa.exc.TimeoutError("it took too long")
