"""A kept file, and the operations of a place that keeps files. For `service.state.outputs`."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import IO, Protocol

from workers.errors import OutputsFull

KEY = "key"
KEY_BYTES = 32
"""The name of the key that signs URLs. It is kept beside the files, so that all gateways that see them share it."""

GONE = "the picture or video is not kept here, or not anymore"

NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp|mp4|zip)")
"""The name of an output: 192 bits that nobody can guess, and the kind of file."""

INPUT = re.compile(r"[A-Za-z0-9_-]{32}\.input")
"""The name of a job's input: no URL leads to it, and it is kept as long as its job, whatever its age."""

KEPT = re.compile(f"{NAME.pattern}|{INPUT.pattern}")
"""The name of any file of a place. All count against `storage.outputs.max_bytes`."""


@dataclass(frozen=True)
class Stored:
    """A finished file, which never changes.

    Attributes:
        name: its name in the place.
        size: in bytes.
        open: opens it for reading; blocks. In a folder, an opened file can be read even after it is removed.
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


class KeptBytes:
    """How many bytes a place keeps, by name: a file that is written again counts once. For all threads.

    Args:
        files: name and size of each.
    """

    def __init__(self, files: Iterable[tuple[str, int]] = ()) -> None:
        self._lock = Lock()
        self._sizes: dict[str, int] = {}
        self._outputs = self._inputs = 0
        for name, size in files:
            self.add(name, size)

    def add(self, name: str, size: int) -> None:
        """A file was written."""
        with self._lock:
            self._count(name, size - self._sizes.get(name, 0))
            self._sizes[name] = size

    def remove(self, name: str) -> None:
        """A file was removed, or was not here."""
        with self._lock:
            self._count(name, -self._sizes.pop(name, 0))

    def _count(self, name: str, more: int) -> None:
        if INPUT.fullmatch(name):
            self._inputs += more
        else:
            self._outputs += more

    def refuse_above(self, max_bytes: int, outputs_only: bool) -> None:
        """Refuse to begin a request while more than `max_bytes` are kept.

        Raises:
            OutputsFull: more are kept.
        """
        if self._outputs + (0 if outputs_only else self._inputs) <= max_bytes:
            return
        raise OutputsFull(f"as much is kept as may be, {max_bytes} bytes; try again when some of it has expired")


class Place(Protocol):
    """Keeps files. All calls block, and raise `OutputsUnavailable` if the place does not answer."""

    @property
    def there(self) -> bool:
        """Whether the place exists; if not, `key` makes it again."""

    def key(self) -> bytes:
        """The key of the place; the first process makes it."""

    def check(self, max_bytes: int | None, outputs_only: bool = False) -> None:
        """Check that files can be kept.

        Args:
            max_bytes: of all files; None: as many as there is room for.
            outputs_only: do not count the inputs of jobs.

        Raises:
            OutputsFull: there is no room, or more than `max_bytes` are kept.
        """

    def write(self, name: str, content: bytes, expires: int) -> None:
        """Keep a file. Even after a crash it is there whole, or not at all.

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

    def sweep(self, ttl_s: float, counted: bool) -> None:
        """Remove outputs that have expired. Inputs stay until their jobs discard them.

        Args:
            ttl_s: how long an output is kept after it was written, in seconds.
            counted: whether `check` has a limit, for which the rest is counted; each file takes some memory.
        """
