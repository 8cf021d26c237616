"""Subprocesses of tests, and all that they start, found by a mark in their environment."""

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from service.rollout import cluster_guard


def marked_processes(mark: str) -> dict[int, str]:
    """The living processes that carry the mark, but for this one: their ids and command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or is not ours
            continue
    return found


def cluster_processes(mark: str, folders: Iterable[str]) -> dict[int, str]:
    """Those that carry the mark, and those of the local clusters with these folders: the titles of Ray's agents cover
    their environment."""
    by_log = {pid: Path(f"/proc/{pid}/cmdline") for folder in folders for pid in cluster_guard.processes(Path(folder))}
    found = marked_processes(mark)
    for pid, command in by_log.items():
        with contextlib.suppress(OSError):
            found.setdefault(pid, command.read_bytes().replace(b"\0", b" ").decode())
    return found


def hear_signals() -> None:
    """In a new process: a shell lets what it starts in the background ignore SIGINT, and children inherit that."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_DFL)
