"""Subprocesses of tests, and all that they start, found by a mark in their environment."""

import os
import signal
from pathlib import Path


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


def hear_signals() -> None:
    """In a new process: a shell lets what it starts in the background ignore SIGINT, and children inherit that."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_DFL)
