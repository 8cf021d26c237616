"""Tells the free space of the folders where a node keeps files. For `workers.exporter` and whoever keeps such files."""

import contextlib
import shutil
import threading
from pathlib import Path
from typing import Literal

from workers.metrics import DISK_FREE, DISK_SIZE

PERIOD_S = 15.0

Folder = Literal["models", "compiled", "outputs", "metrics"]

_folders: dict[Folder, Path] = {}
_started = threading.Lock()
_woken = threading.Event()


def watch_disk(name: Folder, folder: Path) -> None:
    """From now on, tell how much room this folder has. In a thread of its own: a dead network disk blocks who asks.

    Args:
        name: what the node keeps there.
        folder: it may not be there yet; then its nearest parent tells.
    """
    _folders[name] = folder
    _woken.set()
    if _started.acquire(blocking=False):
        threading.Thread(target=_run, name="spray-disk", daemon=True).start()


def tell() -> None:
    """Look at all folders once."""
    for name, folder in list(_folders.items()):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(there)
            DISK_FREE.labels(name).set(usage.free)
            DISK_SIZE.labels(name).set(usage.total)


def _run() -> None:
    while True:
        _woken.clear()
        tell()
        _woken.wait(PERIOD_S)
