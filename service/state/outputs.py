"""Outputs: finished pictures and videos in a folder, for answers that hold a URL. For `service.gateway` and the API.

Every gateway that sees the folder answers for what any of them has put there: the key that signs URLs lies in it too. A
file's time of change is when it expires, so whoever sweeps the folder needs to know nothing else.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from workers.disk import watch_disk
from workers.errors import Forbidden, OutputNotFound
from workers.private_folder import is_own, make_private

logger = logging.getLogger("ray.serve")

PERIOD_S = 60.0
"""Between two sweeps."""

KEY = "key"
NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp|mp4|zip)")
"""Of an output: 192 random bits, and the kind of file."""

UNFINISHED = ".new"
OURS = re.compile(rf"{NAME.pattern}({re.escape(UNFINISHED)})?|[0-9a-f]{{16}}{re.escape(UNFINISHED)}")
"""What a sweep may remove: outputs, those that nobody has finished, and keys that came second."""

UNFINISHED_S = 3600.0
"""After which a file that nobody has finished is removed."""

FOLDER = "spray-outputs-"


@dataclass(frozen=True)
class Link:
    """Where an output is, for whoever holds this.

    Attributes:
        name: of the output.
        expires: when it is removed, in seconds since the epoch.
        signature: proves that a gateway has made this.
    """

    name: str
    expires: int
    signature: str

    @property
    def path(self) -> str:
        """Of the URL, with its query."""
        return f"/v1/outputs/{self.name}?expires={self.expires}&signature={self.signature}"


class OutputStore:
    """Keeps files for a while."""

    def __init__(self) -> None:
        self._given: str | None = None
        self._folder: Path | None = None
        self._key = b""
        self._ttl_s = 3600.0
        self._sweeping: asyncio.Task[None] | None = None

    def follow(self, folder: str | None, ttl_s: float) -> None:
        """Keep files so from now on, and remove those that expire.

        Args:
            folder: `storage.outputs.folder`; None: one of this node and cluster, for this user alone.
            ttl_s: `storage.outputs.ttl_s`, seconds.
        """
        if folder != self._given:
            self._folder = None
        self._given, self._ttl_s = folder, ttl_s
        watch_disk("outputs", Path(folder or own_folder()))
        self._sweeping = self._sweeping or asyncio.create_task(self._sweep_forever())

    def prepare(self) -> None:
        """See that files can be kept, before they are computed. Blocks.

        Raises:
            OSError: the folder cannot be made or written.
        """
        folder = self._open()
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written; set storage.outputs.folder to one that can")

    def keep(self, content: bytes, kind: str) -> Link:
        """Write a file; it is there whole, also after a crash, or not at all. Blocks.

        Args:
            content: of the file.
            kind: its suffix, such as png.

        Raises:
            OSError: the folder cannot be written.
        """
        folder, expires = self._open(), int(time.time() + self._ttl_s) + 1
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        unfinished = folder / f"{name}{UNFINISHED}"
        try:
            with unfinished.open("xb") as file:
                file.write(content)
                file.flush()
                os.utime(file.fileno(), (expires, expires))
                os.fsync(file.fileno())
            unfinished.rename(folder / name)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync(folder)
        return Link(name, expires, self._sign(name, expires))

    def find(self, name: str, expires: str, signature: str) -> Path:
        """The file of an output. Blocks.

        Raises:
            Forbidden: the signature is not of this name and time, or the time has passed.
            OutputNotFound: it is not kept here, or not anymore.
        """
        self._open()
        if not re.fullmatch("[0-9]{1,12}", expires) or not hmac.compare_digest(
            self._sign(name, int(expires)).encode(), signature.encode("utf-8", "replace")
        ):
            raise Forbidden(
                "the URL's signature is not this server's; take the URL as it was answered. (Gateways on several nodes "
                "need a shared folder: storage.outputs.folder.)"
            )
        if time.time() >= int(expires):
            raise Forbidden("the URL has expired; ask for the picture or video again")
        return self.file(name)

    def file(self, name: str) -> Path:
        """The file of an output, for callers that need no signature. Blocks.

        Raises:
            OutputNotFound: it is not kept here, or not anymore.
        """
        file = self._open() / name
        if not NAME.fullmatch(name) or not file.is_file():
            raise OutputNotFound("the picture or video is not kept here, or not anymore")
        return file

    def discard(self, name: str) -> None:
        """Remove an output before it expires, if it is here. Blocks."""
        with contextlib.suppress(OutputNotFound):
            self.file(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what has expired, also in the folders that ended clusters of this user have left. Blocks.

        Only files that are named as outputs are: a folder may hold other things, and anybody may put a link beside it.
        """
        folder = self._open()
        own = [folder] if self._given else {folder, *filter(is_own, folder.parent.glob(f"{FOLDER}*"))}
        for place in own:
            for file in filter(lambda file: OURS.fullmatch(file.name), place.glob("*")):
                late = UNFINISHED_S if file.name.endswith(UNFINISHED) else 0.0
                with contextlib.suppress(OSError):  # another gateway was faster
                    if file.lstat().st_mtime + late < time.time():
                        file.unlink()

    def _sign(self, name: str, expires: int) -> str:
        return hmac.new(self._key, f"{name}\n{expires}".encode(), hashlib.sha256).hexdigest()

    def _open(self) -> Path:
        """The folder, with this object's key read from it, or put there first."""
        given, folder = self._given, self._folder
        if folder is None or not folder.is_dir():  # whoever cleans temporary files may have removed it
            folder = Path(given or own_folder())
            if given:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                make_private(folder)
            key = _shared_key(folder)
            if given == self._given:  # else `follow` has named another one meanwhile
                self._folder, self._key = folder, key
        return folder

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.sweep)
            except Exception as error:
                logger.warning("outputs cannot be swept: %s", error)
            await asyncio.sleep(PERIOD_S)


def own_folder() -> str:
    """Of this node and cluster, which all its gateways find; `SPRAY_OUTPUTS_DIR` names another."""
    cluster = os.environ.get("RAY_RAYLET_PID") or os.getpid()
    return os.environ.get("SPRAY_OUTPUTS_DIR") or f"{tempfile.gettempdir()}/{FOLDER}{cluster}"


def _shared_key(folder: Path) -> bytes:
    """The key of a folder; the first process makes it. A link appears whole, and only if there is none."""
    unfinished = folder / f"{secrets.token_hex(8)}{UNFINISHED}"
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
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
