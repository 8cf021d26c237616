"""Ends what outlives the core of a local cluster. For `LocalCluster`.

Workers and agents of Ray end when they miss their raylet, but not all of them at once: an agent first tries to tell the
gcs of it, for a minute if that is gone, too, and what a signal has stopped misses nothing.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

GRACE_S = 2.0
"""Within which most end by themselves."""

KILLED_S = 5.0
"""A killed process is gone sooner, unless the system is at a loss."""


def end_survivors(metrics: Path) -> None:
    """Wait shortly for the end of a cluster's workers and agents, then kill those that are left. Its core has ended.

    Args:
        metrics: what their `SPRAY_METRICS_DIR` says: no other cluster has the same.
    """
    _, left = psutil.wait_procs(list(_workers(metrics)), GRACE_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            logger.info("process %d has outlived its cluster; it is ended", process.pid)
            process.kill()
    psutil.wait_procs(left, KILLED_S)


def _workers(metrics: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is not ours
            environment = process.environ()
            ours = environment.get("SPRAY_METRICS_DIR") == str(metrics) and "RAY_RAYLET_PID" in environment
            if ours and process.pid != os.getpid():
                yield process
