"""Ends processes of Ray and Serve that a signal has stopped. For `LocalCluster`.

Serve then starts others at once; it looks after a replica's health only once the replica has started, waits 40 seconds
for a proxy, and forever for its controller. Ray's core ends the cluster, which would end a minute later by itself, when
its node is taken for dead. On other clusters a gang guards itself: see `workers.gang.gang_guard`.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import PurePath

import psutil  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

SERVE = ("ray::ServeReplica:", "ray::ServeController", "ray::ProxyActor")
"""How the titles of its processes begin."""

CORE = ("raylet", "gcs_server")
"""The programs of Ray's."""

PERIOD_S = 2.0
"""Between two looks: each reads what all processes of the machine are."""

STOPPED_S = 6.0
"""A process that is stopped for so long is ended."""


class StoppedProcesses:
    """Looks at the descendants of this process until `stop`."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="spray-stopped-processes", daemon=True)
        self._since: dict[psutil.Process, float] = {}  # the monotonic clock

    def start(self) -> None:
        """Look from now on."""
        self._watching.start()

    def stop(self) -> None:
        """Look no more. From any thread; more than once, if need be."""
        self._ended.set()

    def look(self, now: float) -> None:
        """End what is stopped since `STOPPED_S`. `now` is on the monotonic clock."""
        self._since = {process: self._since.get(process, now) for process in _stopped()}
        for process, since in self._since.items():
            if now - since > STOPPED_S:
                with contextlib.suppress(psutil.NoSuchProcess):
                    logger.warning("%s has been stopped for %.0f s; it is ended", _title(process), now - since)
                    process.kill()

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self.look(time.monotonic())


def _stopped() -> Iterable[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = _title(process)
            if (title in CORE or title.startswith(SERVE)) and process.status() == psutil.STATUS_STOPPED:
                yield process


def _title(process: psutil.Process) -> str:
    """The title of a process of Ray's workers, which they fill up with blanks; of others the name of the program."""
    first = " ".join(process.cmdline()[:1]).strip()
    return first if first.startswith("ray::") else PurePath(first).name
