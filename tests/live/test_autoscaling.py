"""On a real cluster: load on one model brings gangs of it and no other, and no request fails while they come and go."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.cli.client import read_cluster
from service.jobs.records import ENDED
from service.rollout.local_cluster import LocalCluster
from tests.benchmarks.autoscale import SCALING, WORK, measure, models, plot
from tests.live.test_metrics import scrape
from tests.support.deployments import deployment, on_rank, ready, wait_for, wait_while

FEW = SCALING.model_copy(
    update={"max_replicas": 2, "downscale_delay_s": 3, "downscale_to_zero_delay_s": 6}  # fewer and sooner: quicker
)
JOBS = 20


@pytest.fixture(scope="module")
def cluster(demo_models: dict[str, Path]) -> Iterator[LocalCluster]:
    with LocalCluster(deployment(*models(demo_models["z-image"], FEW))) as cluster:
        ready(cluster)
        yield cluster


def hold(actor: Any, calm: Path) -> None:
    """In the rank's process: let every forward wait while a file is there."""
    actor._rank._loaded.pipeline.transformer.register_forward_pre_hook(lambda *_: wait_while(calm))


@pytest.mark.soak  # the next one goes the same way
def test_gangs_come_and_go_with_the_load(cluster: LocalCluster, tmp_path: Path) -> None:
    run = measure(cluster.url, seconds=0, most=FEW.max_replicas)
    assert set(run.answers) == {200}
    counts = run.gangs("busy")
    assert counts[0] == 0 and max(counts) == FEW.max_replicas
    peak = counts.index(FEW.max_replicas)
    assert 0 not in counts[1:peak]  # how it climbs is the policy's; it does not sleep under load
    assert counts[-3:] == [1, 0, 1]  # down to one, to sleep, and woken by the last request
    assert run.gangs("still") == [1]
    assert run.pids[0] == run.pids[1]
    plot(run, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_gangs_come_and_go_with_jobs_alone(cluster: LocalCluster, tmp_path: Path) -> None:
    """No caller waits: jobs that wait in the store wake the model, bring the second gang, and are counted."""
    client = httpx.Client(base_url=f"{cluster.url}/v1", timeout=300, trust_env=False)

    def busy() -> dict[str, Any]:
        return next(each for each in read_cluster(cluster.url)["models"] if each["id"] == "busy")

    def running() -> int:
        return int(busy()["replicas"].get("RUNNING", 0))

    def waiting() -> float:
        return scrape(cluster.metrics_url)["spray_requests_queued", frozenset({("model", "busy")})]

    def ends() -> list[tuple[str, Any]]:
        return [(job["state"], job["error"]) for job in client.get("/jobs", params={"limit": 100}).json()["data"]]

    wait_for(busy, lambda found: found["state"] == "asleep")
    for _ in range(JOBS):
        body = WORK | {"model": "busy", "num_inference_steps": 40}
        assert client.post("/images/generations", json=body, headers={"prefer": "respond-async"}).status_code == 202
    assert wait_for(waiting, lambda count: count > JOBS / 2) <= JOBS
    wait_for(running, lambda gangs: gangs > 0)
    (calm := tmp_path / "calm").touch()
    on_rank("busy", 0, hold, calm)  # else all may be drawn before a second gang could help, and none is started
    try:
        wait_for(running, lambda gangs: gangs == FEW.max_replicas)
    finally:
        calm.unlink()
    ended = wait_for(ends, lambda found: {state for state, _ in found} <= ENDED)
    assert ended == [("succeeded", None)] * JOBS
    wait_for(busy, lambda found: found["state"] == "asleep")
    assert wait_for(waiting, lambda count: count == 0) == 0
