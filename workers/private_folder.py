"""Folders that belong to one user alone, at places where others may write. For model files and metrics.

Whoever guesses the name of a temporary folder can make it first, with links in it that lead elsewhere.
"""

import os
import stat
from pathlib import Path
from typing import TextIO


def make_private(folder: Path) -> Path:
    """Make a folder that only this user enters, or take it as it is from an earlier call.

    Returns:
        The folder.

    Raises:
        PermissionError: it is a link, or belongs to somebody else.
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(folder):
        raise PermissionError(f"{folder} belongs to somebody else; remove it, or set TMPDIR to a folder of your own")
    if folder.lstat().st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def is_own(folder: Path) -> bool:
    """Whether this is a folder of this user, not a link to one."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def open_own(file: Path) -> TextIO:
    """Open a file for reading and writing, and create it if it is not there. Nothing in it is changed.

    Raises:
        OSError: it is a link, or cannot be opened.
    """
    return os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+")
