"""An elastic gang of four ranks, two for each request at least: one outlives its ranks, one is paused for another.

Each request has a number of steps of its own, by which it is held inside a step for as long as a test wants.
"""

import base64
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray

from deploy.model_sections import Elastic
from service.rollout.local_cluster import LocalCluster
from tests.live.test_elastic import LONG, SHORT, Watched, draw, now, repeated, standing
from tests.support.deployments import (
    deployment,
    in_each_forward,
    model,
    pixels,
    rank_actors,
    rank_statuses,
    ready,
    wait_for,
)
from tests.support.scraped import scrape, value
from workers.gang.elastic_rank import KEEP_STEPS

pytestmark = pytest.mark.soak

ASYNC = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def cluster(demo_model: Path) -> Iterator[LocalCluster]:
    served = model(demo_model, ulysses_degree=2, ring_degree=2)
    served = served.model_copy(update={"elastic": Elastic(min_degree=2), "max_queued": 16})
    with LocalCluster(deployment(served)) as cluster:
        ready(cluster)
        yield cluster


class Holds:
    """Files that hold requests inside a step: each is named for the steps of one, and says how many are done first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, total: int, after: int) -> None:
        """Hold the request of so many steps; one that is held already goes on until then."""
        new = self._folder / "new"
        new.write_text(str(after))
        new.rename(self._folder / str(total))

    def release(self) -> None:
        """Hold nobody anymore."""
        for file in self._folder.iterdir():
            file.unlink()


def obey(actor: Any, folder: Path) -> None:
    """In a rank's process: hold what runs, if a file says so."""

    def held() -> bool:
        status = actor._rank.status()
        try:
            return bool(status.step >= int((folder / str(status.total_steps)).read_text()))
        except FileNotFoundError:
            return False

    def wait_while_held() -> None:
        while held():
            time.sleep(0.01)

    in_each_forward(actor, wait_while_held)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.fixture
def holds(cluster: LocalCluster, threads: ThreadPoolExecutor, tmp_path: Path) -> Iterator[Holds]:
    """Released before the threads are waited for, which call for what is held."""
    ray.get([rank.__ray_call__.remote(obey, tmp_path) for rank in rank_actors("demo")], timeout=120)
    holds = Holds(tmp_path)
    yield holds
    holds.release()


def by_total(cluster: LocalCluster) -> dict[int, dict[str, Any]]:
    """What the gang runs, by its number of steps."""
    return {each["total_steps"]: each for each in standing(cluster)}


def side_by_side(
    cluster: LocalCluster, holds: Holds, first: tuple[int, int], second: tuple[int, int], begin: Callable[[int], object]
) -> dict[int, dict[str, Any]]:
    """Begin two requests, and hold both when each has two ranks and has done some steps.

    Args:
        cluster: where.
        holds: of its ranks.
        first: how many steps the first has, and how many it does.
        second: likewise.
        begin: sends the request of so many steps.

    Returns:
        What the gang says of them.
    """
    holds.put(first[0], 1)
    begin(first[0])
    wait_for(lambda: by_total(cluster), lambda seen: first[0] in seen and seen[first[0]]["step"] == 1)
    holds.put(*second)
    begin(second[0])
    wait_for(lambda: by_total(cluster), lambda seen: second[0] in seen)
    holds.put(*first)  # if it has all ranks, it soon gives up half of them
    seen = wait_for(
        lambda: by_total(cluster),
        lambda seen: [seen[total]["step"] for total, _ in (first, second)] == [first[1], second[1]],
    )
    assert sorted(each["ranks"] for each in seen.values()) == [[0, 1], [2, 3]]
    return seen


def test_a_request_outlives_one_of_its_ranks_and_who_runs_beside_it_does_not_notice(
    cluster: LocalCluster, holds: Holds, threads: ThreadPoolExecutor
) -> None:
    long, short = Watched(cluster, num_inference_steps=60), Watched(cluster, **SHORT | {"num_inference_steps": 30})
    requests = {60: long, 30: short}
    expected = {total: draw(cluster, each.request) for total, each in requests.items()}
    drawn: dict[int, Future[Any]] = {}

    def begin(total: int) -> None:
        drawn[total] = threads.submit(requests[total])

    # The first keeps its state every five steps, and at its only move, after its second step or soon after.
    seen = side_by_side(cluster, holds, (60, 11), (30, 3), begin)
    pids = [status.pid for status in rank_statuses("demo")]
    beside = {pids[rank] for rank in seen[30]["ranks"]}
    victim = pids[seen[60]["ranks"][1]]
    short.pids = set(pids)
    os.kill(victim, signal.SIGKILL)
    holds.release()
    for total, picture in drawn.items():
        assert np.abs(picture.result() - expected[total]).max() <= 1
    assert 0 < repeated(long) <= KEEP_STEPS
    assert [step for step, _ in short.steps] == list(range(1, 31))  # none of them twice
    assert all(beside <= living for _, living in short.steps[3:])  # on ranks that were there before
    assert victim not in short.steps[-1][1]

    new = wait_for(lambda: now(cluster), lambda seen: len(seen["pids"]) == 4 and not {*seen["pids"]} & {*pids})
    assert not new["trouble"]
    assert np.abs(draw(cluster, long.request) - expected[60]).max() <= 1


def submit(cluster: LocalCluster, body: dict[str, Any]) -> str:
    """Have a job of batch work accepted; return its id."""
    body = {"model": "demo", "priority": "batch", **body}
    url = f"{cluster.url}/v1/images/generations"
    answer = httpx.post(url, json=body, headers=ASYNC, timeout=60, trust_env=False)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def made(cluster: LocalCluster, job: str) -> Any:
    """The picture of a job, once it is done."""
    url = f"{cluster.url}/v1/jobs/{job}"
    ended = wait_for(
        lambda: httpx.get(url, timeout=60, trust_env=False).json(),
        lambda job: job["state"] not in ("queued", "running"),
    )
    assert ended["state"] == "succeeded", ended
    content = httpx.get(f"{url}/content", timeout=60, trust_env=False).content
    return pixels(base64.b64encode(content).decode())


def test_interactive_work_pauses_batch_work_within_one_step(
    cluster: LocalCluster, holds: Holds, threads: ThreadPoolExecutor
) -> None:
    requests = {
        60: LONG | {"num_inference_steps": 60},
        50: LONG | {"num_inference_steps": 50, "seed": 10},
        20: SHORT | {"num_inference_steps": 20, "seed": 11},
    }
    expected = {total: draw(cluster, each) for total, each in requests.items()}
    pauses, steps = now(cluster)["changes"]["pause"], steps_done(cluster)
    jobs: dict[int, str] = {}

    def begin(total: int) -> None:
        jobs[total] = submit(cluster, requests[total])

    apart = side_by_side(cluster, holds, (60, 7), (50, 5), begin)
    holds.put(20, 0)
    interactive = threads.submit(draw, cluster, requests[20])
    wait_for(lambda: by_total(cluster), lambda seen: 20 in seen)
    (encodes,) = (total for total in jobs if 0 in apart[total]["ranks"])  # after its next step, before another one
    holds.put(encodes, apart[encodes]["step"] + 1)
    before = wait_for(lambda: by_total(cluster), lambda seen: seen[encodes]["step"] == apart[encodes]["step"] + 1)
    assert before[20]["ranks"] == []  # in the middle of a step of both
    for total in jobs:
        holds.put(total, 25)
    during = wait_for(
        lambda: by_total(cluster),
        lambda seen: seen[20]["ranks"] and any(seen[total]["step"] == 25 for total in jobs),
    )
    (paused,) = (total for total in jobs if not during[total]["ranks"])
    assert during[paused]["step"] == before[paused]["step"] + 1
    holds.release()
    assert np.abs(interactive.result() - expected[20]).max() <= 1
    for total, job in jobs.items():
        assert np.abs(made(cluster, job) - expected[total]).max() <= 1
    assert now(cluster)["changes"]["pause"] > pauses
    assert steps_done(cluster) - steps == 60 + 50 + 20  # no step was repeated


def steps_done(cluster: LocalCluster) -> float:
    """By all gangs of the cluster."""
    return value(scrape(cluster.metrics_url), "spray_steps_total", model="demo", replica="0")
