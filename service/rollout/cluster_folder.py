"""The folder of a local cluster: for its user alone, and removed even if the process that made it was killed.

Ray lets everybody write to its folder, so it gets one inside this folder.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TextIO

from workers.private_folder import open_own

PREFIX = "spray-"
LOCK = "in_use"

MAX_PLACE_BYTES = 24
"""The names of sockets end at 107 bytes, of which Ray's session and this folder take the rest."""


def place() -> Path:
    """The parent of such folders: the temporary folder, or /tmp if its path is too long."""
    temporary = Path(tempfile.gettempdir())
    return temporary if len(os.fsencode(temporary)) <= MAX_PLACE_BYTES else Path("/tmp")


def make_folder() -> tuple[Path, TextIO]:
    """Make a folder that only this user enters.

    Returns:
        The folder, and the file whose lock says that it is in use, until it is closed or this process ends.
    """
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place()))
    unlocked = folder / "new"
    lock = unlocked.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    unlocked.rename(folder / LOCK)  # only now: a folder whose lock is free counts as abandoned
    return folder, lock


def remove_abandoned() -> None:
    """Remove the folders of this user's clusters whose process was killed."""
    for lock in place().glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):  # in use, of somebody else, or removed by another process just now
            if lock.parent.lstat().st_uid == os.getuid():
                with open_own(lock) as held:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(lock.parent, ignore_errors=True)
