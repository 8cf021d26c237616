"""The fleet simulation: it obeys its own physics, and in it our policy scales up, down and to zero."""

import dataclasses
import statistics

from tests.benchmarks.fleet import Control, Fleet
from tests.benchmarks.fleet_traffic import DAY_S, LOADS, day

LOAD = dataclasses.replace(LOADS[1], per_second=0.04)
OURS = Control(True, 20, 5, 300, 900, target=30)
SERVE = Control(False, 30, 0, 300, 300, target=0.8)


def test_work_is_neither_lost_nor_done_twice() -> None:
    arrivals = day(LOAD, 1)
    for control in (OURS, SERVE):
        outcome = Fleet(LOAD, arrivals, control).run()
        assert len(outcome.waits_s) == len(arrivals)
        assert min(outcome.waits_s) >= 0
        work_s = sum(arrival.seconds for arrival in arrivals)
        assert work_s * 0.99 < outcome.busy_s < work_s * 1.2  # besides, cold shapes
        assert outcome.busy_s < outcome.gang_s < LOAD.max_replicas * DAY_S


def test_more_gangs_wait_less() -> None:
    arrivals = day(LOAD, 1)
    few, many = (Fleet(LOAD, arrivals, dataclasses.replace(SERVE, target=t)).run() for t in (2.0, 0.5))
    assert many.replica_hours > few.replica_hours
    assert statistics.fmean(many.waits_s) < statistics.fmean(few.waits_s)


def test_a_burst_brings_gangs_and_its_end_takes_them_away() -> None:
    begin_s, end_s = 20000.0, 23000.0
    sample = day(LOAD, 1)[:1000]
    arrivals = [dataclasses.replace(a, at_s=begin_s + 3 * number) for number, a in enumerate(sample)]
    asleep = dataclasses.replace(LOAD, min_replicas=0)
    outcome = Fleet(asleep, arrivals, OURS).run()
    assert outcome.most > sum(arrival.seconds for arrival in arrivals) / (end_s - begin_s)
    assert outcome.gang_s < 2.5 * outcome.busy_s  # awake for the burst, not for the day
    assert statistics.median(outcome.waits_s[500:]) < 5  # once awake, it keeps up


def test_ours_takes_fewer_hours_than_counting_requests_at_no_longer_waits() -> None:
    arrivals = day(LOAD, 5)
    ours, serve = (Fleet(LOAD, arrivals, control).run() for control in (OURS, dataclasses.replace(SERVE, target=1.0)))
    assert ours.replica_hours < serve.replica_hours
    assert ours.wait_s(0.95) <= serve.wait_s(0.95)
