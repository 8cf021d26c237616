"""Ends what is left of a local cluster once the process that started it has ended, in whatever way. For `LocalCluster`.

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

ENDS_WITHIN_S = GRACE_S + KILLED_S + 5.0
"""A guard takes longer only if it is stopped itself."""

LOOK_S = 0.1

OUTPUTS = (".out", ".err")
"""Ray gives all that it starts such files for output, in the logs of its session. A program that has only connected to
the cluster, such as `spray deploy`, has others there."""

STARTER = os.getppid() if __name__ == "__main__" else os.getpid()
"""The process that has started the cluster. It opens these files when it starts Ray."""


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


def end_guard(guard: subprocess.Popen[bytes]) -> None:
    """Let a guard begin, and wait until it has ended."""
    try:
        guard.communicate(timeout=ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()


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
    """The ids of the living processes that Ray has started for the cluster, by their `OUTPUTS`. Their environment tells
    less, for the titles that they give themselves cover it. None where the system does not tell.
    """
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != STARTER and has_output_below(folder, process / "fd"):
            yield int(process.name)


def has_output_below(folder: Path, files: Path) -> bool:
    """Whether one of these open files of a process is an output of Ray's below a folder, open for writing."""
    with contextlib.suppress(OSError):  # the process has ended, or is not ours
        for file in files.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed since
                path = file.readlink()
                is_output = path.name.removesuffix(" (deleted)").endswith(OUTPUTS)
                if is_output and folder in path.parents and file.lstat().st_mode & stat.S_IWUSR:
                    return True
    return False


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    clean_up(Path(sys.argv[1]), float(sys.argv[2]))
