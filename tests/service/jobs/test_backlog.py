"""What the autoscaler, the metrics and new jobs with a deadline are told of the jobs that wait in the store."""

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from service.autoscaling import LOOK_BACK_S
from service.jobs import backlog as module
from service.jobs.backlog import HELD_S, POINT_S, SOURCE, JobBacklog
from service.jobs.records import Counts, Queued
from service.jobs.requests import new_job
from service.names import app_name
from sp_core.degrees import ParallelDegrees
from tests.service.jobs.stores import Clock
from workers.gang.cost import Cost, CostModel, Costs
from workers.messages import GenerationRequest, GenerationResult, MediaInput

SMALL = Cost(10, 10, 1, 1, 2, 0, 0.1, 1.0, 0.1, 1.0, 3)
LARGE = Cost(20, 20, 1, 1, 2, 0, 0.4, 1.0, 0.4, 1.0, 1)
"""Both take a second outside their steps, and a millisecond of a step for each pixel."""

GANG = {"request_s": 2.0, "costs": Costs("", (SMALL, LARGE)).as_stats()}
Told = list[tuple[str, Mapping[str, Sequence[tuple[float, float]]]]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(time=clock, monotonic=clock))
    return clock


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    reports: Told = []
    monkeypatch.setattr(module, "report_waiting", lambda *report: reports.append(report))
    return reports


def tell(backlog: JobBacklog, **counts: Counts) -> None:
    asyncio.run(backlog.tell(counts))


def test_before_the_first_request_jobs_count_as_requests(clock: Clock, told: Told) -> None:
    backlog = JobBacklog(lambda: {"film": ()})
    tell(backlog, film=Counts(queued=3, running=1, queued_work=9999), removed=Counts(queued=5))
    assert told == [(SOURCE, {app_name("film"): [(clock.now, 3.0)]})]
    assert backlog.share() == {"film": Queued(3.0, 0.0), "removed": Queued(5.0, 0.0)}


def test_long_jobs_count_for_more(clock: Clock, told: Told) -> None:
    gangs: dict[str, list[dict[str, Any]]] = {"film": [GANG, GANG]}
    backlog = JobBacklog(lambda: gangs)
    waiting = Counts(queued=2, queued_work=10 * 400)  # ten steps of large pictures
    tell(backlog, film=waiting)
    ((_, report),) = told
    assert report[app_name("film")][-1][1] == pytest.approx((4.0 + 2 * 1.0) / 2.0)  # three typical requests
    backlog.gateways = 3
    assert backlog.share()["film"].seconds == pytest.approx(2.0)
    assert backlog.wait_s("film", waiting) == pytest.approx(3.0)  # two gangs share it
    gangs["film"] = []  # asleep: what a request takes is not forgotten
    assert backlog.wait_s("film", waiting) == pytest.approx(6.0)
    assert backlog.wait_s("other", waiting) == 0.0


def test_serve_hears_of_the_end_and_then_nothing(clock: Clock, told: Told) -> None:
    backlog = JobBacklog(lambda: {"film": (), "idle": ()})
    tell(backlog)
    assert told == []
    tell(backlog, film=Counts(queued=1))  # at once: it wakes the model
    tell(backlog, film=Counts(queued=2))
    assert [report for _, report in told] == [{app_name("film"): [(clock.now, 1.0)]}]
    for _ in range(int(LOOK_BACK_S / POINT_S) + 5):
        clock.now += POINT_S
        tell(backlog)
    last = told[-1][1][app_name("film")]
    assert {count for _, count in last} == {0.0}
    assert last[-1][0] - last[0][0] == pytest.approx(LOOK_BACK_S)
    reports = len(told)
    assert any(count for _, count in told[-2][1][app_name("film")])
    clock.now += POINT_S
    tell(backlog)
    assert len(told) == reports


def test_a_clock_that_is_set_back_silences_nobody(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    wall, steady = Clock(), Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(time=wall, monotonic=steady))
    backlog = JobBacklog(lambda: {"film": ()})
    tell(backlog, film=Counts(queued=1))
    wall.now -= 3600
    for queued in (2, 3):
        steady.now += POINT_S
        wall.now += POINT_S
        tell(backlog, film=Counts(queued=queued))
    last = told[-1][1][app_name("film")]
    assert last == [(wall.now - POINT_S, 2.0), (wall.now, 3.0)]


def test_jobs_that_cannot_be_begun_bring_no_gangs(clock: Clock, told: Told) -> None:
    backlog = JobBacklog(lambda: {"film": ()})
    tell(backlog, film=Counts(queued=9))
    backlog.hold()
    for _ in range(60):
        clock.now += POINT_S
        tell(backlog, film=Counts(queued=9))
    assert len(told) == 1  # Serve forgets it after ten seconds
    assert backlog.share()["film"].jobs == 9
    backlog.release()
    tell(backlog, film=Counts(queued=9))  # at once
    assert told[-1][1][app_name("film")][-1][1] == 9.0
    backlog.hold()
    clock.now += HELD_S  # and none was claimed by this gateway since
    tell(backlog, film=Counts(queued=9))
    assert len(told) == 3


def test_jobs_count_as_what_they_cost_an_elastic_gang(clock: Clock, told: Told) -> None:
    """Beside others, a job takes four times what it costs."""
    shares = [cost._replace(share=0.25) for cost in (SMALL, LARGE)]
    backlog = JobBacklog(lambda: {"film": [{"request_s": 0.5, "costs": Costs("", tuple(shares)).as_stats()}]})
    tell(backlog, film=Counts(queued=2, queued_work=10 * 400))
    assert backlog.share()["film"].seconds == pytest.approx((4.0 + 2 * 1.0) / 4)


def test_a_job_that_does_a_share_of_its_steps_counts_for_that_share(clock: Clock, told: Told) -> None:
    picture = (MediaInput("image", b"one"),)
    request = GenerationRequest("a", "film", "a", 64, 64, 10, seed=1, inputs=picture, strength=0.3)
    costs = CostModel()
    result = GenerationResult((), (), ParallelDegrees(), 0.5, (0.5,) * 3, 0.5)
    costs.observe(request, 2, result)
    gang = {"request_s": costs.mean_cost_s, "costs": costs.costs("FluxPipeline").as_stats()}
    backlog = JobBacklog(lambda: {"film": [gang]})
    counts = Counts(queued=4, queued_work=4 * new_job(request, "ann").work)
    tell(backlog, film=counts)
    assert backlog.share()["film"].seconds == pytest.approx(4 * 2.5)
    assert told[-1][1][app_name("film")][-1][1] == pytest.approx(4.0)
