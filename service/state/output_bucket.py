"""Finished files in a bucket of S3, or of a store that speaks its language. For `service.state.outputs`; calls block.

An object appears whole or not at all, so it needs no temporary name. Credentials, region and endpoint come from the
gateway's environment, under AWS's own names, or from the node's role. The bucket knows when a file was written, and
files expire by that time.
"""

import contextlib
import functools
import io
import logging
import os
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import IO, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from deploy.spec import SpecError
from service.state.stored import GONE, KEPT, KEY, KEY_BYTES, NAME, KeptBytes, Stored
from workers.errors import OutputNotFound, OutputsUnavailable

logger = logging.getLogger("ray.serve")

CONNECT_S, ANSWER_S, RETRY_S = 5, 60, 20
READ_BYTES = 4 << 20
"""Bytes of a file that one request reads."""


class Bucket:
    """A bucket of outputs, or the part of a bucket below a prefix.

    Args:
        url: `storage.outputs.url`: s3://BUCKET or s3://BUCKET/PREFIX.

    Raises:
        SpecError: the environment's settings for S3 are not valid.
    """

    there = True

    def __init__(self, url: str) -> None:
        plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
        wait = {"connect_timeout": timedelta(seconds=CONNECT_S), "timeout": timedelta(seconds=ANSWER_S)}
        options = wait | {"allow_http": plain}  # which is read nowhere else once there are options
        again = {"max_retries": 3, "retry_timeout": timedelta(seconds=RETRY_S)}
        try:
            self._store = S3Store.from_url(url, client_options=options, retry_config=again)  # type: ignore[arg-type]
        except BaseError as error:
            raise SpecError(f"storage.outputs.url is {url}, which cannot be opened: {error}") from None
        self._bytes: KeptBytes | None = None  # when it was last swept, and what has changed since

    def key(self) -> bytes:
        """See `Place`."""
        with _answering():
            try:
                return bytes(obstore.get(self._store, KEY).bytes())
            except FileNotFoundError:
                with contextlib.suppress(AlreadyExistsError):  # another gateway was faster
                    obstore.put(self._store, KEY, secrets.token_bytes(KEY_BYTES), mode="create")
                return bytes(obstore.get(self._store, KEY).bytes())

    def check(self, max_bytes: int | None, outputs_only: bool = False) -> None:
        """See `Place`."""
        with _answering():
            obstore.head(self._store, KEY)
        if max_bytes is not None:
            kept = self._bytes = self._bytes or KeptBytes((name, size) for name, size, _ in self._files())
            kept.refuse_above(max_bytes, outputs_only)

    def write(self, name: str, content: bytes, expires: int) -> None:
        """See `Place`."""
        with _answering():
            obstore.put(self._store, name, content)
        if (kept := self._bytes) is not None:  # a sweep may forget it meanwhile
            kept.add(name, len(content))

    def find(self, name: str) -> Stored:
        """See `Place`."""
        with _answering():
            try:
                size = obstore.head(self._store, name)["size"]
            except FileNotFoundError:
                raise OutputNotFound(GONE) from None
        return Stored(name, size, functools.partial(self._open, name))

    def remove(self, name: str) -> None:
        """See `Place`."""
        with _answering(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, name)
        if (kept := self._bytes) is not None:
            kept.remove(name)

    def sweep(self, ttl_s: float, counted: bool) -> None:
        """Remove outputs that were written longer ago than this."""
        kept = KeptBytes() if counted else None
        for name, size, written_at in self._files():
            if NAME.fullmatch(name) and written_at + ttl_s < time.time():
                self.remove(name)
            elif kept is not None:
                kept.add(name, size)
        self._bytes = kept

    def _files(self) -> Iterator[tuple[str, int, float]]:
        """Name, bytes and time of each of our files; others are left alone."""
        with _answering():
            for some in obstore.list(self._store):
                for found in some:
                    if KEPT.fullmatch(found["path"]):
                        yield found["path"], found["size"], found["last_modified"].timestamp()

    def _open(self, name: str) -> IO[bytes]:
        with _answering():
            try:
                return cast(IO[bytes], _Reader(obstore.open_reader(self._store, name, buffer_size=READ_BYTES)))
            except FileNotFoundError:
                raise OutputNotFound(GONE) from None


class _Reader(io.RawIOBase):
    """An object as a Python file."""

    def __init__(self, opened: "obstore.ReadableFile") -> None:
        self._opened = opened

    def readable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True: the index of an MP4 is at its end."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes from the current position; all that follow if `size` is negative."""
        with _answering():
            return bytes(self._opened.read(None if size is None or size < 0 else size))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to another position."""
        return self._opened.seek(offset, whence)


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Replace the bucket's errors by ours: they name accounts and keys, and only go to the log.

    Raises:
        OutputsUnavailable: it does not answer, refuses, or is not there.
    """
    try:
        yield
    except (BaseError, OSError) as error:
        logger.warning("the bucket of outputs cannot be used: %s", error)
        raise OutputsUnavailable("the bucket that keeps pictures and videos cannot be used now") from error
