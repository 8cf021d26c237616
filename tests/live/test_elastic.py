"""An elastic gang on a real cluster: requests side by side, on changing ranks; one outlives its ranks."""

import base64
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

from deploy.model_sections import Elastic
from service.cli.main import main
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import PATIENCE_S, deployment, model, pixels, rank_statuses, ready, wait_for
from workers.gang.elastic_rank import KEEP_STEPS
from workers.gang.local import generate_locally
from workers.gang.process_state import is_halted
from workers.messages import GenerationRequest, RankStatus

LONG = {"prompt": "a cup of coffee", "num_inference_steps": 100, "size": "128x128", "seed": 9}
SHORT = {"prompt": "a fox", "num_inference_steps": 6, "size": "64x48"}
FIXED = GenerationRequest("fixed", "demo", "a cup of coffee", width=128, height=128, num_inference_steps=100, seed=9)
"""`LONG`, for a gang that is not elastic."""


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


class Watched:
    """A request whose steps are followed. Call it in a thread of its own."""

    def __init__(self, cluster: LocalCluster, **request: Any) -> None:
        self.request, self._cluster = LONG | request, cluster
        self.steps: list[tuple[int, set[int]]] = []  # each with those of the ranks' processes that lived then
        self.pids: set[int] = set()

    def __call__(self) -> Any:
        body = {"model": "demo", "stream": True, "stream_options": {"include_progress": True}, **self.request}
        url = f"{self._cluster.url}/v1/images/generations"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_S, trust_env=False) as answer:
            for line in answer.iter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if "step" in event:
                    self.steps.append((event["step"], {pid for pid in self.pids if not is_halted(pid)}))
                if "b64_json" in event:
                    picture = pixels(event["b64_json"])
        return picture


def repeated(watched: Watched) -> int:
    """Steps that it has done twice, after the only loss of its ranks. 0: its state had just been kept."""
    steps = [step for step, _ in watched.steps]
    jumps = [i for i in range(1, len(steps)) if steps[i] != steps[i - 1] + 1]
    if not jumps:
        assert steps == list(range(1, watched.request["num_inference_steps"] + 1))
        return 0
    (back,) = jumps
    assert steps[:back] == list(range(1, back + 1))
    assert steps[back:] == list(range(steps[back], watched.request["num_inference_steps"] + 1))
    return steps[back - 1] - steps[back] + 1


def test_a_request_that_loses_its_ranks_goes_on_from_what_was_kept(cluster: LocalCluster) -> None:
    long = Watched(cluster)
    expected = draw(cluster, LONG)
    with ThreadPoolExecutor(1) as threads:
        drawn = threads.submit(long)
        statuses = wait_for(
            lambda: rank_statuses("demo"),
            lambda seen: any(status.phase == "denoise" and 20 <= status.step < 90 for status in seen),
        )
        shares = all(status.phase == "denoise" for status in statuses)
        for status in statuses[1:] if shares else statuses:  # one that another waits for; else none is left
            os.kill(status.pid, signal.SIGKILL)
        assert np.abs(drawn.result() - expected).max() <= 1
    assert {status.pid for status in rank_statuses("demo")}.isdisjoint(status.pid for status in statuses)
    assert repeated(long) <= KEEP_STEPS


def both_at_work(first: Watched, second: Watched) -> list[RankStatus]:
    """Wait until each has a rank of its own, and something was kept of it."""
    totals = {each.request["num_inference_steps"] for each in (first, second)}

    def apart(seen: list[RankStatus]) -> bool:
        return {status.total_steps for status in seen} == totals and all(
            status.phase == "denoise" and KEEP_STEPS < status.step < 60 for status in seen
        )

    return wait_for(lambda: rank_statuses("demo"), apart)


def now(cluster: LocalCluster) -> dict[str, Any]:
    """What the gang says of itself."""
    (found,) = httpx.get(f"{cluster.url}/v1/cluster", timeout=60, trust_env=False).json()["models"]
    (gang,) = found["gangs"]
    return dict(gang["now"])


@pytest.mark.parametrize(
    ("victim", "fault"), [(1, signal.SIGKILL), pytest.param(0, signal.SIGSTOP, marks=pytest.mark.soak)]
)
def test_what_runs_beside_a_lost_rank_does_not_notice(
    cluster: LocalCluster, demo_model: Path, victim: int, fault: signal.Signals
) -> None:
    one, other = Watched(cluster), Watched(cluster, seed=10, num_inference_steps=90)
    expected = {each: draw(cluster, each.request) for each in (one, other)}
    with ThreadPoolExecutor(2) as threads:
        drawn = {each: threads.submit(each) for each in (one, other)}
        statuses = both_at_work(one, other)
        pids = [status.pid for status in statuses]
        one.pids, other.pids = set(pids), set(pids)
        os.kill(pids[victim], fault)
        for each in (one, other):
            assert np.abs(drawn[each].result() - expected[each]).max() <= 1
    hit, beside = (one, other) if statuses[victim].total_steps == 100 else (other, one)
    total, survivor = beside.request["num_inference_steps"], pids[1 - victim]
    assert [step for step, _ in beside.steps] == list(range(1, total + 1))  # none of them twice
    after_loss = [living for _, living in beside.steps if pids[victim] not in living]
    assert after_loss and all(living == {survivor} for living in after_loss[-20:])  # on ranks that were there before

    assert repeated(hit) <= KEEP_STEPS
    new = wait_for(lambda: now(cluster), lambda seen: len(seen["pids"]) == 2 and not {*seen["pids"]} & {*pids})
    assert not new["trouble"]
    assert np.abs(draw(cluster, one.request) - expected[one]).max() <= 1
    if victim == 1:
        fixed = generate_locally(model(demo_model, ulysses_degree=2), FIXED, on_step=lambda _: None)
        assert np.abs(pixels(base64.b64encode(fixed.outputs[0]).decode()) - expected[one]).max() <= 1


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
