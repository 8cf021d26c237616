"""Prometheus hears how many jobs wait and run, how long calls of the store take, and which were not answered."""

import asyncio
import math
import shutil
from pathlib import Path

import prometheus_client
import pytest

from service.jobs.observed import OPERATIONS, ObservedJobs
from service.jobs.records import Counts
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from workers.errors import JobsUnavailable


def told(name: str, **labels: str) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(name, labels)


def test_jobs_by_model_and_state_vanish_with_their_model() -> None:
    jobs = ObservedJobs()
    jobs.tell({"film a": Counts(queued=3, running=2)}, ["film a", "film b"])
    states = ("queued", "running")
    assert [told("spray_jobs", model="film a", state=state) for state in states] == [3, 2]
    assert [told("spray_jobs", model="film b", state=state) for state in states] == [0, 0]
    jobs.tell({}, ["film a"])
    assert [told("spray_jobs", model="film a", state=state) for state in states] == [0, 0]
    gone = told("spray_jobs", model="film b", state="queued")
    assert gone is not None and math.isnan(gone)


def test_jobs_that_have_ended_by_model_and_state_vanish_with_their_model() -> None:
    jobs = ObservedJobs()
    jobs.tell_ended({("film c", "succeeded"): 7, ("gone", "failed"): 1}, ["film c", "film d"])
    states = ("succeeded", "failed", "cancelled", "expired")
    assert [told("spray_jobs_ended", model="film c", state=state) for state in states] == [7, 0, 0, 0]
    assert [told("spray_jobs_ended", model="film d", state=state) for state in states] == [0] * 4
    assert told("spray_jobs_ended", model="gone", state="failed") is None  # a model of another deployment
    jobs.tell_ended({("film c", "succeeded"): 8}, ["film c"])
    assert told("spray_jobs_ended", model="film c", state="succeeded") == 8
    gone = told("spray_jobs_ended", model="film d", state="failed")
    assert gone is not None and math.isnan(gone)


def test_the_disk_with_the_jobs_is_watched_where_a_file_keeps_them(tmp_path: Path) -> None:
    jobs = Jobs()
    jobs.follow(str(tmp_path), None, 60)
    disk = asyncio.run(jobs.ask(JobStore.disk))
    assert disk is not None and 0 < disk[0] < disk[1] == shutil.disk_usage(tmp_path).total
    ObservedJobs().tell_disk(disk)
    assert told("spray_disk_free_bytes", folder="jobs") == disk[0]
    assert told("spray_disk_size_bytes", folder="jobs") == disk[1]
    ObservedJobs().tell_disk(None)
    gone = told("spray_disk_free_bytes", folder="jobs")
    assert gone is not None and math.isnan(gone)


def test_calls_of_the_store_are_timed_and_their_errors_counted(tmp_path: Path) -> None:
    jobs = Jobs()
    assert all(told("spray_job_store_errors_total", operation=operation) is not None for operation in OPERATIONS)
    assert {"submit", "claim", "renew", "publish", "counts"} <= set(OPERATIONS)

    def seen() -> tuple[float, float]:
        calls = told("spray_job_store_seconds_count", operation="counts") or 0.0
        return calls, told("spray_job_store_errors_total", operation="counts") or 0.0

    before = seen()
    jobs.follow(str(tmp_path), None, 60)
    assert asyncio.run(jobs.ask(JobStore.counts)) == {}
    assert (seen()[0] - before[0], seen()[1] - before[1]) == (1, 0)

    def away(_store: JobStore) -> None:
        raise JobsUnavailable("the disk is full")

    away.__name__ = "counts"
    with pytest.raises(JobsUnavailable):
        asyncio.run(jobs.ask(away))
    assert (seen()[0] - before[0], seen()[1] - before[1]) == (2, 1)
