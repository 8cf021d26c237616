"""How long a call of the store may take, and connections to PostgreSQL that keep to it.

A network that drops packets, or a server that hangs, answers never: TCP gives up after a quarter of an hour, and behind
a proxy that takes every byte it never does. So each wait of a connection ends with the call that it is part of. What
was sent by then may still be carried out: the connection is closed, and whoever called is told that nobody knows.

`service.jobs.store_actor` limits calls, `service.jobs.database` transactions, `service.jobs.engines` connects.
"""

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.abc import RV, PQGen
from psycopg.pq import TransactionStatus

CALL_S = 8.0
"""For one call of PostgreSQL, connecting included."""

CONNECT_S = 5
"""For a connection of PostgreSQL; psycopg takes whole seconds, two at least."""

OPEN_S = 120.0
"""For one statement that makes or changes the tables, which may be long."""

LOOK_S = 0.1
"""Between two looks of a connection that waits."""

OVER_TCP = {
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": int(1000 * CALL_S),
}
"""Connections that nobody answers on are given up by the kernel, also while nothing is asked."""

_calls = threading.local()


@contextlib.contextmanager
def until(end: float) -> Iterator[None]:
    """Let no wait of this thread last longer, in seconds of `time.monotonic`; an earlier end from outside holds."""
    before = getattr(_calls, "until", math.inf)
    _calls.until = min(before, end)
    try:
        yield
    finally:
        _calls.until = before


def left_s() -> float:
    """Seconds until the call of this thread has to end; infinite: there is no limit."""
    end: float = getattr(_calls, "until", math.inf)
    return end - time.monotonic()


class BoundedConnection(psycopg.Connection[Any]):
    """A connection to PostgreSQL that waits no longer than the call that it is part of."""

    def wait(self, gen: PQGen[RV], interval: float = LOOK_S, timeout: float | None = None) -> RV:
        """As psycopg's.

        Raises:
            psycopg.OperationalError: no answer has come in time. The connection is closed, for the answer may come.
        """
        longest = min(left_s(), OPEN_S, math.inf if timeout is None else timeout)
        try:
            return super().wait(gen, interval=interval, timeout=max(0.0, longest))
        except psycopg.OperationalError:
            if self.info.transaction_status != TransactionStatus.ACTIVE:
                raise
            self.close()
            raise psycopg.OperationalError("PostgreSQL has not answered in time") from None


def connect(dialect: sa.Dialect, record: Any, args: list[Any], given: dict[str, Any]) -> BoundedConnection:
    """Connect within `CONNECT_S` with what SQLAlchemy has made of the URL; for its event `do_connect`.

    Raises:
        psycopg.OperationalError: the server cannot be reached, or not within the call.
    """
    left = left_s()
    if left <= 0:
        raise psycopg.OperationalError("there is no time left to connect to PostgreSQL")
    return BoundedConnection.connect(*args, **given | {"connect_timeout": math.ceil(min(CONNECT_S, left))})
