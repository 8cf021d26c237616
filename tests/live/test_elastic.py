"""An elastic gang on a real cluster: requests side by side, on changing ranks; one outlives its ranks."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deploy.spec import Elastic
from service.cli.main import main
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import PATIENCE_S, deployment, model, pixels, rank_statuses, ready, wait_for
from workers.gang.elastic_rank import KEEP_STEPS

LONG = {"prompt": "a cup of coffee", "num_inference_steps": 100, "size": "128x128", "seed": 9}
SHORT = {"prompt": "a fox", "num_inference_steps": 6, "size": "64x48"}


@pytest.fixture(scope="module")
def cluster(demo_model: Path) -> Iterator[LocalCluster]:
    served = model(demo_model, ulysses_degree=2).model_copy(update={"elastic": Elastic(), "max_queued": 16})
    with LocalCluster(deployment(served)) as cluster:
        ready(cluster)
        yield cluster


def draw(cluster: LocalCluster, request: dict[str, Any]) -> Any:
    body = {"model": "demo", **request}
    answer = httpx.post(f"{cluster.url}/v1/images/generations", json=body, timeout=PATIENCE_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    return pixels(answer.json()["data"][0]["b64_json"])


def standing(cluster: LocalCluster) -> list[dict[str, Any]]:
    """What the gang runs, as `/v1/cluster` says."""
    (found,) = httpx.get(f"{cluster.url}/v1/cluster", timeout=60, trust_env=False).json()["models"]
    return [each for gang in found["gangs"] for each in gang["now"]["requests"]]


def test_short_requests_do_not_wait_for_a_long_one(cluster: LocalCluster) -> None:
    shorts = [SHORT | {"seed": seed} for seed in range(4)]
    alone = [draw(cluster, short) for short in shorts]
    expected = draw(cluster, LONG)
    with ThreadPoolExecutor(5) as threads:
        long = threads.submit(draw, cluster, LONG)
        wait_for(lambda: standing(cluster), bool)
        drawn = list(threads.map(lambda short: draw(cluster, short), shorts))
        assert not long.done()  # it has many steps of a larger picture; they were overtaken by nobody
        assert np.abs(long.result() - expected).max() <= 1
    for picture, reference in zip(drawn, alone, strict=True):
        assert np.abs(picture - reference).max() <= 1


def test_a_request_that_loses_its_ranks_goes_on_from_what_was_kept(cluster: LocalCluster) -> None:
    expected = draw(cluster, LONG)
    with ThreadPoolExecutor(1) as threads:
        long = threads.submit(draw, cluster, LONG)
        statuses = wait_for(
            lambda: rank_statuses("demo"), lambda seen: 20 <= seen[0].step < LONG["num_inference_steps"]
        )
        os.kill(statuses[1].pid, signal.SIGKILL)
        assert np.abs(long.result() - expected).max() <= 1
    after = rank_statuses("demo")
    assert {status.pid for status in after}.isdisjoint(status.pid for status in statuses)
    # They have passed a boundary after each step, and one before the first.
    repeated = after[0].progress - 1 - (LONG["num_inference_steps"] - statuses[0].step)
    assert repeated <= KEEP_STEPS  # or below zero: a step or two may have passed before the kill


def test_a_profile_is_of_the_ranks_that_serve_it(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_SERVER", cluster.url)

    def profile(folder: str, steps: int) -> dict[str, Any]:
        assert main(["profile", "demo", "--steps", str(steps), "--output", str(tmp_path / folder)]) == 0
        summary: dict[str, Any] = json.loads((tmp_path / folder / "summary.json").read_text())
        for each in summary["ranks"]:
            assert each["steps"] == steps
            events = json.loads((tmp_path / folder / f"rank-{each['rank']}.json").read_text())["traceEvents"]
            exchanges = sum("alltoall" in str(event.get("name")) for event in events)
            assert exchanges >= 2 * steps if len(summary["ranks"]) > 1 else exchanges == 0
        return summary

    alone = profile("alone", 3)
    ranks = {"ulysses_degree=2": [0, 1], "1 rank": [0]}  # the latter where a step on two takes longer on this machine
    assert [each["rank"] for each in alone["ranks"]] == ranks[alone["layout"]]
    with ThreadPoolExecutor(1) as threads:
        long = threads.submit(draw, cluster, LONG)
        wait_for(lambda: standing(cluster), bool)
        beside = profile("beside", 2)
        long.result()
    assert beside["layout"] == "1 rank" and len(beside["ranks"]) == 1


def test_who_leaves_ends_a_request_at_its_next_step(cluster: LocalCluster) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{cluster.url}/v1/images/generations", json={"model": "demo", **LONG}, timeout=0.5, trust_env=False)
    began = time.monotonic()
    wait_for(lambda: standing(cluster), lambda found: not found)
    assert time.monotonic() - began < 10
    draw(cluster, SHORT)
