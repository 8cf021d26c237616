"""A file that is kept, wherever it lies, and what a place for such files can do. For `service.state.outputs`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Protocol

from workers.errors import OutputsFull

KEY = "key"
KEY_BYTES = 32
"""The key that signs URLs lies beside the files, so that every gateway which sees them has the same."""

GONE = "the picture or video is not kept here, or not anymore"

NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp|mp4|zip)")
"""Of an output: 192 random bits, and the kind of file."""

INPUT = re.compile(r"[A-Za-z0-9_-]{32}\.input")
"""Of what a job begins with: no URL leads to it, and it is kept as long as its job, whatever its age."""

KEPT = re.compile(f"{NAME.pattern}|{INPUT.pattern}")
"""Of all files of a place: each takes of `storage.outputs.max_bytes`."""


@dataclass(frozen=True)
class Stored:
    """A finished file, which never changes.

    Attributes:
        name: in its place.
        size: bytes.
        open: for reading; blocks. In a folder nobody can take an opened file away.
    """

    name: str
    size: int
    open: Callable[[], IO[bytes]]

    @property
    def kind(self) -> str:
        """The suffix of its name, such as png."""
        return self.name.rpartition(".")[2]

    def read_bytes(self) -> bytes:
        """All of it. Blocks."""
        with self.open() as opened:
            return opened.read()


def refuse_above(kept: int, max_bytes: int | None) -> None:
    """Begin nothing more while more bytes are kept than may be.

    Raises:
        OutputsFull: there are.
    """
    if max_bytes is not None and kept > max_bytes:
        raise OutputsFull(f"as much is kept as may be, {max_bytes} bytes; try again when some of it has expired")


class Place(Protocol):
    """Where files lie. All calls block, and raise `OutputsUnavailable` or `OSError` where the place does not answer."""

    @property
    def there(self) -> bool:
        """False: it has to be made anew, by `key`."""

    def key(self) -> bytes:
        """The key of the place; the first process makes it."""

    def check(self, max_bytes: int | None) -> None:
        """See that files can be kept.

        Raises:
            OutputsFull: there is no room, or there are more bytes than may be.
        """

    def write(self, name: str, content: bytes, expires: int) -> None:
        """Keep a file; it is there whole, also after a crash, or not at all.

        Raises:
            OutputsFull: there is no room.
        """

    def find(self, name: str) -> Stored:
        """A file.

        Raises:
            OutputNotFound: it is not here, or not anymore.
        """

    def remove(self, name: str) -> None:
        """Remove a file, if it is here."""

    def sweep(self, ttl_s: float) -> None:
        """Remove outputs that have expired. Inputs stay: whoever knows their jobs removes them."""
