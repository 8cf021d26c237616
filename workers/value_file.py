"""A process's file of metric values, which a full disk cannot turn into the death of its process.

prometheus_client maps files that it has only declared to be long. When the disk is full, the first write into a page
that has no block yet ends the process (SIGBUS), in the middle of a step. Here the blocks are taken before they are
mapped. If there are none, the values go on in memory: the file keeps what it had, and this process's metrics stand
still.
Used by `workers.exporter`.
"""

import logging
import mmap
import os
from typing import Any

from prometheus_client import mmap_dict

logger = logging.getLogger("ray.serve")


class ValueFile(mmap_dict.MmapedDict):
    """A dict of numbers in a file, or in memory where there is no room for the file.

    Attributes:
        shared: the values are in the file.
    """

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        self.shared = True
        self._mapped: Any = None
        try:
            super().__init__(filename, read_mode)  # type: ignore[no-untyped-call]
        except OSError as error:
            if read_mode or not hasattr(os, "memfd_create"):
                raise
            self._warn(filename, error)
            self.shared = False
            memory = os.memfd_create("spray-metrics")
            super().__init__(f"/proc/self/fd/{memory}")  # type: ignore[no-untyped-call]

    @property
    def _m(self) -> Any:
        """What is mapped. The base class sets it after it has made the file longer."""
        return self._mapped

    @_m.setter
    def _m(self, mapped: Any) -> None:
        if mapped is not None and self.shared and self._f is not None and self._f.writable():
            mapped = self._with_blocks(mapped)
        elif mapped is not None and not self.shared:
            mapped = self._in_memory(self._capacity)
        self._mapped = mapped

    def _with_blocks(self, mapped: Any) -> Any:
        try:
            _take_blocks(self._f.fileno(), len(mapped))
        except OSError as error:
            self._warn(self._fname, error)
            self.shared = False
            return self._in_memory(len(mapped))
        return mapped

    def _warn(self, filename: str, error: OSError) -> None:
        logger.warning("metrics: no room for %s, whose values are exported no more: %s", filename, error.strerror)

    def _in_memory(self, size: int) -> Any:
        memory = mmap.mmap(-1, size)
        if self._mapped is not None:
            memory[: len(self._mapped)] = self._mapped[:]
        return memory


def _take_blocks(file: int, size: int) -> None:
    """Let a file have blocks for so many bytes, and keep what is in it.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
