"""What a gateway tells Prometheus of jobs: how many wait, run and have ended, and how its calls of the store go.

Told by `service.jobs.runner`, at each look for work, and by `service.jobs.store_actor`, at each call.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from service.jobs.records import ENDED, Counts, State
from service.jobs.store import JobStore
from workers.errors import JobsUnavailable
from workers.metrics import DISK_FREE, DISK_SIZE, JOB_STORE_ERRORS, JOB_STORE_SECONDS, JOBS, JOBS_ENDED
from workers.observing import GONE

OPERATIONS = tuple(name for name in dir(JobStore) if not name.startswith("_"))


class ObservedJobs:
    """Sets the gauges of jobs, and ends those of models that are removed."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._told_ended: set[str] = set()

    def tell(self, counts: Mapping[str, Counts], models: Collection[str]) -> None:
        """Set all gauges.

        Args:
            counts: of jobs that have not ended, by model; models without such jobs are absent.
            models: of the deployment.
        """
        present = {*counts, *models}
        for model in self._told | present:
            found = counts.get(model, Counts())
            for state, count in (("queued", found.queued), ("running", found.running)):
                JOBS.labels(model, state).set(count if model in present else GONE)
        self._told = present

    def tell_ended(self, ended: Mapping[tuple[str, State], int], models: Collection[str]) -> None:
        """Set the counts of jobs that have ended, which outlive this process in the store.

        Args:
            ended: by model and state; states without such jobs are absent.
            models: of the deployment.
        """
        for model in self._told_ended | set(models):
            for state in ENDED:
                JOBS_ENDED.labels(model, state).set(ended.get((model, state), 0) if model in models else GONE)
        self._told_ended = set(models)

    def tell_disk(self, disk: tuple[int, int] | None) -> None:
        """Set the gauges of the disk with the jobs: bytes that are free, and in all. None: nobody knows."""
        free, size = disk or (GONE, GONE)
        DISK_FREE.labels("jobs").set(free)
        DISK_SIZE.labels("jobs").set(size)


def begin_at_zero() -> None:
    """Make the counter of errors of each operation, so that the first error is a rise."""
    for operation in OPERATIONS:
        JOB_STORE_ERRORS.labels(operation)


@contextmanager
def observing_store(operation: str) -> Iterator[None]:
    """Count a call of the store, and whether the store could be reached."""
    began = time.perf_counter()
    try:
        yield
    except JobsUnavailable:
        JOB_STORE_ERRORS.labels(operation).inc()
        raise
    finally:
        JOB_STORE_SECONDS.labels(operation).observe(time.perf_counter() - began)
