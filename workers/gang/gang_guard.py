"""Ends the process of a gang that is stopped. Ranks on the gang's node look: `workers.gang.rank_actor` starts it.

Serve looks after the health of a replica only once it has started, and loading may take half an hour.
"""

import logging
import os
import signal
import threading
import time

from workers.gang.process_state import is_stopped

logger = logging.getLogger(__name__)

PERIOD_S = 1.0

STOPPED_S = 6.0
"""A process that is stopped for so long is ended; Serve then starts another."""


def guard(pid: int) -> None:
    """Look after a process of this machine in a thread, until it ends or this process does."""
    threading.Thread(target=_look, args=(pid,), daemon=True, name="gang-guard").start()


def _look(pid: int) -> None:
    runs_at = time.monotonic()
    while (stopped := is_stopped(pid)) is not None:
        now = time.monotonic()
        if not stopped:
            runs_at = now
        elif now - runs_at > STOPPED_S:
            logger.error("the gang's process %d is stopped for %.0f s; it is ended", pid, now - runs_at)
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(PERIOD_S)
