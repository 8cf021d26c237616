"""Outputs: finished pictures and videos, for answers with a URL and for jobs. For `service.gateway` and the API.

The inputs of jobs are kept beside them, for `service.jobs.inputs`. The place is a folder or a bucket. Every gateway
that sees it can answer for the files of all gateways, because the key that signs URLs is kept there too.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from service.state.output_bucket import Bucket
from service.state.output_folder import Folder, own_folder
from service.state.stored import GONE, INPUT, KEPT, NAME, Place, Stored
from workers.disk import watch_disk
from workers.errors import Forbidden, OutputNotFound

logger = logging.getLogger("ray.serve")

PERIOD_S = 60.0
"""Seconds between two sweeps."""


@dataclass(frozen=True)
class Link:
    """A signed link to an output.

    Attributes:
        name: the name of the output.
        expires: when it is removed, in seconds since the epoch.
        signature: proves that a gateway has made the link.
    """

    name: str
    expires: int
    signature: str

    @property
    def path(self) -> str:
        """The path of the URL, with its query."""
        return f"/v1/outputs/{self.name}?expires={self.expires}&signature={self.signature}"


def new_input_name() -> str:
    """A name that nobody can guess, for an input of a job."""
    return new_output_name("input")


def new_output_name(kind: str) -> str:
    """A name that nobody can guess, for an output with this suffix."""
    return f"{secrets.token_urlsafe(24)}.{kind}"


class OutputStore:
    """Keeps files for a while."""

    def __init__(self) -> None:
        self._where: tuple[str | None, str | None] = (None, None)
        self._place: Place | None = None
        self._key = b""
        self._ttl_s = 3600.0
        self._max_bytes: int | None = None
        self._sweeping: asyncio.Task[None] | None = None

    def follow(self, folder: str | None, ttl_s: float, url: str | None = None, max_bytes: int | None = None) -> None:
        """Keep files by these settings from now on, and remove those that expire.

        Args:
            folder: `storage.outputs.folder`; None: one of this node and cluster, for this user alone.
            ttl_s: `storage.outputs.ttl_s`, seconds.
            url: `storage.outputs.url`, instead of a folder.
            max_bytes: `storage.outputs.max_bytes`.

        Raises:
            SpecError: the environment's settings for the bucket are not valid.
        """
        place = Bucket(url) if url and (folder, url) != self._where else None
        if (folder, url) != self._where:
            self._place, self._key = place, b""
        self._where, self._ttl_s, self._max_bytes = (folder, url), ttl_s, max_bytes
        if url is None:
            watch_disk("outputs", Path(folder or own_folder()))
        self._sweeping = self._sweeping or asyncio.create_task(self._sweep_forever())

    @property
    def named(self) -> bool:
        """Whether the deployment names the place. Otherwise it may end with the cluster, or belong to one node."""
        return self._where != (None, None)

    def prepare(self, outputs_only: bool = False) -> None:
        """Check that files can be kept, before they are computed. Blocks.

        Args:
            outputs_only: count no inputs of jobs against `storage.outputs.max_bytes`. They stay until their jobs have
                run, which would otherwise wait for each other.

        Raises:
            OutputsFull: there is no room.
            OutputsUnavailable: the folder cannot be used, or the bucket does not answer.
        """
        self._open().check(self._max_bytes, outputs_only)

    @property
    def ttl_s(self) -> float:
        """How long an output is kept after it was written, in seconds."""
        return self._ttl_s

    def keep(self, content: bytes, kind: str, name: str | None = None) -> Link:
        """Write a file. Even after a crash it is there whole, or not at all. Blocks.

        Args:
            content: the content of the file.
            kind: the suffix of the file, such as png.
            name: from `new_output_name`; a file of this name is written again, and expires later. None: a new one.

        Raises:
            OutputsFull: there is no room.
            OutputsUnavailable: the folder cannot be used, or the bucket does not answer.
        """
        place, expires = self._open(), int(time.time() + self._ttl_s) + 1
        name = name or new_output_name(kind)
        place.write(name, content, expires)
        return Link(name, expires, self._sign(name, expires))

    def keep_once(self, owner: str, content: bytes, kind: str) -> Link:
        """As `keep`, but the same content of an owner is one file: an answer that is sent again takes no more room.

        Args:
            owner: who may know that there is such a file already.
            content: the content of the file.
            kind: the suffix of the file.

        Raises:
            OutputsFull, OutputsUnavailable: see `keep`.
        """
        self._open()  # and with it the key, without which nobody can guess the name
        told = hmac.new(self._key, f"{owner}\n{kind}\n".encode() + hashlib.sha256(content).digest(), hashlib.sha256)
        return self.keep(content, kind, f"{base64.urlsafe_b64encode(told.digest()[:24]).decode()}.{kind}")

    def keep_input(self, name: str, content: bytes) -> None:
        """Write an input of a job, as `keep` does. It stays until it is discarded. Blocks.

        Args:
            name: from `new_input_name`.
            content: the content of the file.

        Raises:
            OutputsFull, OutputsUnavailable: see `keep`.
        """
        self._open().write(name, content, int(time.time()))

    def input(self, name: str) -> Stored:
        """An input of a job. Blocks.

        Raises:
            OutputNotFound: it is not kept here, or not anymore.
            OutputsUnavailable: the folder cannot be used, or the bucket does not answer.
        """
        place = self._open()
        if not INPUT.fullmatch(name):
            raise OutputNotFound(GONE)
        return place.find(name)

    def find(self, name: str, expires: str, signature: str) -> Stored:
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

    def file(self, name: str) -> Stored:
        """The file of an output, for callers that need no signature. Blocks.

        Raises:
            OutputNotFound: it is not kept here, or not anymore.
            OutputsUnavailable: the folder cannot be used, or the bucket does not answer.
        """
        place = self._open()
        if not NAME.fullmatch(name):
            raise OutputNotFound(GONE)
        return place.find(name)

    def discard(self, name: str) -> None:
        """Remove an output before it expires, or an input, if it is here. Blocks."""
        if KEPT.fullmatch(name):
            self._open().remove(name)

    def sweep(self) -> None:
        """Remove expired files. Blocks."""
        self._open().sweep(self._ttl_s, self._max_bytes is not None)

    def _sign(self, name: str, expires: int) -> str:
        return hmac.new(self._key, f"{name}\n{expires}".encode(), hashlib.sha256).hexdigest()

    def _open(self) -> Place:
        """The place. Its key is read, or made if there is none."""
        where, place = self._where, self._place
        if place is None:
            place = Folder(where[0])
        if place is not self._place or not self._key or not place.there:
            key = place.key()
            if where == self._where:  # else `follow` has named another one meanwhile
                self._place, self._key = place, key
        return place

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.sweep)
            except Exception as error:
                logger.warning("outputs cannot be swept: %s", error)
            await asyncio.sleep(PERIOD_S)
