"""Ends what is left of a local cluster when the process that has started it ends, however it does. For `LocalCluster`.

Ray's processes end when they miss their core, but not all at once: an agent first tries to tell the gcs of it, for a
minute if that is gone, too, and what a signal has stopped misses nothing. A process of its own looks, because one that
is killed cleans nothing up. Python runs this file by its path and without site-packages, so that the guard starts in
some milliseconds: it imports nothing of ours.
"""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GRACE_S = 2.0
"""Within which most processes end by themselves."""

KILLED_S = 10.0
"""A killed process is gone much sooner, unless the system is at a loss."""

LOOK_S = 0.1

STARTER = os.getppid() if __name__ == "__main__" else os.getpid()
"""The process that has started the cluster: it writes there, too."""


def start_guard(folder: Path, grace_s: float = GRACE_S) -> subprocess.Popen[bytes]:
    """Guard a cluster that this process is about to start.

    Args:
        folder: of the cluster; it is removed at the end.
        grace_s: how long its processes may take to end by themselves.

    Returns:
        The guard. It begins when its standard input is closed, and ends when nothing is left.
    """
    command = [sys.executable, "-I", "-S", __file__, str(folder), str(grace_s)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def clean_up(folder: Path, grace_s: float) -> None:
    """Return when no process of the cluster is there anymore, nor its folder."""
    kill_at = time.monotonic() + grace_s
    while (left := list(processes(folder))) and time.monotonic() < kill_at + KILLED_S:
        if time.monotonic() > kill_at:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_S)
    shutil.rmtree(folder, ignore_errors=True)


def processes(folder: Path) -> Iterator[int]:
    """The ids of the living processes of the cluster: each of Ray's writes to a log below the folder. Their environment
    tells less, for the titles that they give themselves cover it. None where the system does not tell.
    """
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != STARTER and writes_below(folder, process / "fd"):
            yield int(process.name)


def writes_below(folder: Path, files: Path) -> bool:
    """Whether one of these open files of a process lies below a folder, and may be written."""
    with contextlib.suppress(OSError):  # the process has ended, or is not ours
        for file in files.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed since
                if file.lstat().st_mode & stat.S_IWUSR and folder in file.readlink().parents:
                    return True
    return False


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    clean_up(Path(sys.argv[1]), float(sys.argv[2]))
