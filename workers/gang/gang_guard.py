"""Ends the process of a gang that is stopped by a signal. `workers.gang.gang` starts one guard as its first act.

Serve looks after the health of a replica only once it has started, and loading may take half an hour. A process of its
own looks, because a stopped one runs no thread. Python runs this file by its path and without site-packages, so that
the guard starts in some milliseconds: it imports nothing of ours.
"""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PERIOD_S = 1.0

STOPPED_S = 6.0
"""A process that is stopped for so long is ended; Serve then starts another."""


def start_guard(period_s: float = PERIOD_S, stopped_s: float = STOPPED_S) -> subprocess.Popen[bytes]:
    """Guard this process by one that ends with it: when the pipe between them closes.

    Args:
        period_s: between two looks.
        stopped_s: how long a stop is forgiven.

    Returns:
        The guard. Keep it: its end of the pipe is closed when it is collected.
    """
    arguments = [str(os.getpid()), str(period_s), str(stopped_s)]
    return subprocess.Popen([sys.executable, "-I", "-S", __file__, *arguments], stdin=subprocess.PIPE)


def look_after(pid: int, period_s: float, stopped_s: float) -> None:
    """Return when the process ends; end it if it is stopped for too long."""
    runs_at = time.monotonic()
    while not select.select([sys.stdin], [], [], period_s)[0]:
        now = time.monotonic()
        if not is_stopped(pid):
            runs_at = now
        elif now - runs_at > stopped_s:
            print(f"the gang's process {pid} is stopped for {now - runs_at:.0f} s; it is ended", file=sys.stderr)
            os.kill(pid, signal.SIGKILL)
            return


def is_stopped(pid: int) -> bool:
    """True if a process of this machine is stopped by a signal. False where the system does not tell."""
    try:
        state = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in "Tt"


if __name__ == "__main__":
    look_after(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
