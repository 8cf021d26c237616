"""Finished files in a folder that all gateways of a deployment see. For `service.state.outputs`; its calls block.

A file's modification time is when it expires, so a sweep needs to know nothing else.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from service.state.stored import GONE, KEPT, KEY, KEY_BYTES, NAME, KeptBytes, Stored
from workers.errors import OutputNotFound, OutputsFull, OutputsUnavailable
from workers.private_folder import is_own, make_private

logger = logging.getLogger("ray.serve")

UNFINISHED = ".new"
OURS = re.compile(rf"{NAME.pattern}|({KEPT.pattern}|[0-9a-f]{{16}}){re.escape(UNFINISHED)}")
"""Files that a sweep may remove: outputs, and unfinished files, of which older versions named some by their output."""

UNFINISHED_S = 3600.0
"""Seconds after which an unfinished file is removed."""

LEAST_FREE_BYTES = 32 << 20
"""Bytes that must be free on the disk; with less, no request begins, because its output could not be kept."""

FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL = "the disk that keeps pictures and videos is full; try again later"
FOLDER = "spray-outputs-"
ANSWERS = "files"
"""The folder inside one of this node and cluster with the answers of idempotency keys, which are no outputs."""


class Folder:
    """A folder of outputs.

    Args:
        folder: `storage.outputs.folder`; None: one of this node and cluster, for this user alone.
    """

    def __init__(self, folder: str | None) -> None:
        self._given = folder
        self._folder = Path(folder or own_folder())
        self._bytes: KeptBytes | None = None  # when it was last swept, and what has changed since

    def key(self) -> bytes:
        """See `Place`."""
        with _answering():
            if self._given:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                make_private(self._folder)
            with _told_if_full():
                return _shared_key(self._folder)

    @property
    def there(self) -> bool:
        """Whether the folder still exists: a cleaner of temporary files may have removed it."""
        try:
            return self._folder.is_dir()
        except OSError:  # of a network; `key` tells
            return False

    def check(self, max_bytes: int | None, outputs_only: bool = False) -> None:
        """See `Place`."""
        with _answering():
            if not os.access(self._folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{self._folder} cannot be written; set storage.outputs.folder to one that can")
            free = shutil.disk_usage(self._folder).free
        if free < LEAST_FREE_BYTES:
            raise OutputsFull(DISK_FULL)
        if max_bytes is not None:
            kept = self._bytes = self._bytes or KeptBytes(self._sizes())
            kept.refuse_above(max_bytes, outputs_only)

    def write(self, name: str, content: bytes, expires: int) -> None:
        """See `Place`."""
        unfinished = _new_unfinished(self._folder)  # not by this name: the same answer may be written twice at once
        with _answering(), _told_if_full():
            self._write(unfinished, name, content, expires)
        if (kept := self._bytes) is not None:  # a sweep may forget it meanwhile
            kept.add(name, len(content))

    def _write(self, unfinished: Path, name: str, content: bytes, expires: int) -> None:
        try:
            with unfinished.open("xb") as file:
                file.write(content)
                file.flush()
                os.utime(file.fileno(), (expires, expires))
                os.fsync(file.fileno())
            unfinished.rename(self._folder / name)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync(self._folder)

    def find(self, name: str) -> Stored:
        """See `Place`."""
        file = self._folder / name
        with _answering():
            try:
                size = file.stat().st_size
            except FileNotFoundError:
                raise OutputNotFound(GONE) from None
        return Stored(name, size, functools.partial(_open, file))

    def remove(self, name: str) -> None:
        """See `Place`."""
        with _answering():
            (self._folder / name).unlink(missing_ok=True)
        if (kept := self._bytes) is not None:
            kept.remove(name)

    def sweep(self, ttl_s: float, counted: bool) -> None:
        """See `Place`. It also sweeps the folders that ended clusters of this user have left.

        Only files with names of outputs are removed: a folder may hold other things, and anybody may put a link beside
        it.
        """
        own = [self._folder] if self._given else {self._folder, *filter(is_own, self._folder.parent.glob(f"{FOLDER}*"))}
        left = [] if self._given else [place / ANSWERS for place in own]
        for place in (*own, *left):
            for file in filter(lambda file: OURS.fullmatch(file.name), place.glob("*")):
                late = UNFINISHED_S if file.name.endswith(UNFINISHED) else 0.0
                with contextlib.suppress(OSError):  # another gateway was faster
                    if file.lstat().st_mtime + late < time.time():
                        file.unlink()
        self._bytes = None

    def _sizes(self) -> Iterator[tuple[str, int]]:
        for file in filter(lambda file: KEPT.fullmatch(file.name), self._folder.glob("*")):
            with contextlib.suppress(OSError):
                yield file.name, file.lstat().st_size


def own_folder() -> str:
    """The folder of this node and cluster, which all its gateways find; `SPRAY_OUTPUTS_DIR` names another."""
    cluster = os.environ.get("RAY_RAYLET_PID") or os.getpid()
    return os.environ.get("SPRAY_OUTPUTS_DIR") or f"{tempfile.gettempdir()}/{FOLDER}{cluster}"


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Replace the system's errors by ours: they name folders, and only go to the log.

    Raises:
        OutputsUnavailable: the folder cannot be used.
    """
    try:
        yield
    except OSError as error:
        logger.warning("the folder of outputs cannot be used: %s", error)
        raise OutputsUnavailable("the folder that keeps pictures and videos cannot be used now") from error


@contextlib.contextmanager
def _told_if_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise OutputsFull(DISK_FULL) from error
        raise


def _open(file: Path) -> IO[bytes]:
    with _answering():
        try:
            return file.open("rb")
        except FileNotFoundError:
            raise OutputNotFound(GONE) from None


def _new_unfinished(folder: Path) -> Path:
    """A name for a file that is being written. No other writer has it."""
    return folder / f"{secrets.token_hex(8)}{UNFINISHED}"


def _shared_key(folder: Path) -> bytes:
    """The key of a folder; the first process makes it. A hard link appears whole, and only if there is none yet."""
    with contextlib.suppress(FileNotFoundError):  # first: what is kept can be read where nothing can be written
        return (folder / KEY).read_bytes()
    unfinished = _new_unfinished(folder)
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            (folder / KEY).hardlink_to(unfinished)
    finally:
        unfinished.unlink(missing_ok=True)
    return (folder / KEY).read_bytes()


def _sync(folder: Path) -> None:
    """Make a rename durable."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
