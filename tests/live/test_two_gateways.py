"""Two gateways: each answers for both, and when one is killed under load nothing is lost and nothing is drawn twice.

Prints how many pictures were drawn for how many keys.
"""

import os
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from deploy.gateway_spec import GatewaySpec
from service.jobs.runner import LEASE_S
from service.names import GATEWAY, GATEWAY_APP
from service.rollout.local_cluster import LocalCluster
from tests.live.test_faults import hold
from tests.live.test_metrics import scrape
from tests.support.deployments import PATIENCE_S, deployment, model, on_rank, rank_statuses, ready, wait_for

pytestmark = pytest.mark.soak

KEYS, CALLERS = 24, 6
IN_FLIGHT = 2
"""Pictures of one gang that nobody waits for anymore when a gateway dies: one on the ranks, one being encoded."""

REQUEST = {"model": "demo", "prompt": "a cup of coffee", "num_inference_steps": 4}


@pytest.fixture(scope="module")
def cluster(demo_model: Path) -> Iterator[LocalCluster]:
    spec = deployment(model(demo_model).model_copy(update={"max_queued": KEYS}))
    both = spec.model_copy(update={"gateway": GatewaySpec(port=0, grpc_port=0, replicas=2)})
    with LocalCluster(both) as cluster:
        ready(cluster)
        wait_for(running_gateways, lambda running: running == 2)
        time.sleep(3)  # the proxy has heard of both
        assert generate(cluster.url).status_code == 200
        yield cluster


def running_gateways() -> int:
    states = serve.status().applications[GATEWAY_APP].deployments[GATEWAY].replica_states
    return sum(count for state, count in states.items() if str(state).endswith("RUNNING"))


def generate(server: str, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server}/v1/images/generations", json=REQUEST, headers=headers, timeout=PATIENCE_S, trust_env=False
    )


def asked(server: str) -> Any:
    """What one of the gateways says, over a connection of its own."""
    return httpx.get(f"{server}/v1/requests", timeout=PATIENCE_S, trust_env=False).json()


def gateways() -> list[int]:
    """The processes of the gateways, as they say themselves."""
    actors = [ray.get_actor(each["name"], namespace=each["namespace"]) for each in gateway_actors()]
    return [ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=120) for actor in actors]


def gateway_actors() -> list[dict[str, str]]:
    """Their names and namespaces."""
    named: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return [each for each in named if each["name"].startswith("SERVE_REPLICA::gatew")]


def test_any_gateway_lists_and_cancels(cluster: LocalCluster, tmp_path: Path) -> None:
    (calm := tmp_path / "calm").touch()
    on_rank("demo", 0, hold, calm)
    with ThreadPoolExecutor(8) as callers:
        try:
            answers = [callers.submit(generate, cluster.url, **{"x-request-id": f"r{i}"}) for i in range(8)]
            listed = wait_for(lambda: asked(cluster.url)["data"], lambda data: len(data) == 8)
            assert len({each["gateway"] for each in listed}) == 2, "one gateway has all requests"
            wait_for(
                lambda: asked(cluster.url)["data"],
                lambda data: sorted(str(each["position"]) for each in data) == [*map(str, range(1, 8)), "None"],
            )
            for _ in range(10):  # whoever is asked
                assert [each["id"] for each in asked(cluster.url)["data"]] == [each["id"] for each in listed]
            (running,) = (each for each in asked(cluster.url)["data"] if each["state"] == "running")
            for each in listed:
                gone = httpx.delete(f"{cluster.url}/v1/requests/{each['id']}", timeout=60, trust_env=False)
                assert gone.status_code == 200, gone.text
            assert asked(cluster.url)["data"] == []
        finally:
            calm.unlink()
        for answer in answers:
            assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (499, "cancelled")
    wait_for(lambda: rank_statuses("demo")[0].phase, lambda phase: phase == "idle")
    assert rank_statuses("demo")[0].step < running["total_steps"]
    assert generate(cluster.url).status_code == 200


def test_a_killed_gateway_costs_no_request_and_no_key_a_second_picture(cluster: LocalCluster, capsys: Any) -> None:
    before = drawn(cluster)
    keys = [uuid.uuid4().hex for _ in range(KEYS)]
    tries = dict.fromkeys(keys, 0)

    def call(key: str) -> httpx.Response:
        """As a client that tries again does: the same request with the same key."""
        until = time.monotonic() + PATIENCE_S
        while True:
            tries[key] += 1
            try:
                answer = generate(cluster.url, **{"idempotency-key": key})
                if answer.status_code < 500:
                    return answer
            except httpx.TransportError as error:
                answer = httpx.Response(0, text=str(error))
            assert time.monotonic() < until, answer.text
            time.sleep(0.5)

    with ThreadPoolExecutor(CALLERS) as callers:
        answers = [callers.submit(call, key) for key in keys]
        wait_for(lambda: sum(answer.done() for answer in answers), lambda done: done >= KEYS // 4)
        os.kill(gateways()[0], signal.SIGKILL)
        first = [answer.result() for answer in answers]
    assert [answer.status_code for answer in first] == [200] * KEYS, {answer.text[:200] for answer in first}
    assert max(tries.values()) > 1, "the gateway that was killed had no request"
    pictures = drawn(cluster) - before
    with capsys.disabled():
        print(f" {pictures:.0f} pictures for {KEYS} keys, {sum(tries.values())} tries;", end="")
    assert KEYS <= pictures <= KEYS + IN_FLIGHT

    again = [call(key) for key in keys]
    assert [answer.content for answer in again] == [answer.content for answer in first]
    assert all(answer.headers["idempotency-replayed"] == "true" for answer in again)
    assert len({answer.json()["data"][0]["seed"] for answer in first}) == KEYS
    assert drawn(cluster) - before == pictures


def test_a_gateway_that_is_stopped_hands_its_job_over_at_once(cluster: LocalCluster, tmp_path: Path) -> None:
    """As Serve stops a replica. The lease of its job would last for half a minute."""
    (calm := tmp_path / "calm").touch()
    on_rank("demo", 0, hold, calm)
    try:
        headers = {"prefer": "respond-async"}
        url = f"{cluster.url}/v1/images/generations"
        job_id = httpx.post(url, json=REQUEST, headers=headers, timeout=60, trust_env=False).json()["id"]
        (first,) = wait_for(lambda: asked(cluster.url)["data"], lambda data: len(data) == 1)
        assert first["id"].startswith(f"{job_id}-1")
        (stopped,) = (actor for actor in gateway_actors() if actor["name"].endswith(first["gateway"]))
        actor = ray.get_actor(stopped["name"], namespace=stopped["namespace"])
        ray.get(actor.perform_graceful_shutdown.remote(), timeout=60)
        began = time.monotonic()
        (second,) = wait_for(
            lambda: asked(cluster.url)["data"],
            lambda data: [each["gateway"] != first["gateway"] for each in data] == [True],
        )
        assert second["id"].startswith(f"{job_id}-2")
        assert time.monotonic() - began < LEASE_S / 2
        ray.kill(actor)
    finally:
        calm.unlink()
    job = wait_for(
        lambda: httpx.get(f"{cluster.url}/v1/jobs/{job_id}", timeout=60, trust_env=False).json(),
        lambda found: found["ended_at"] is not None,
    )
    assert (job["state"], job["attempt"]) == ("succeeded", 1)


def drawn(cluster: LocalCluster) -> float:
    """Pictures that the gang has decoded."""
    samples = scrape(cluster.metrics_url)
    return sum(
        seen
        for (name, labels), seen in samples.items()
        if name == "spray_stage_seconds_count" and {("stage", "decode"), ("rank", "0")} <= labels
    )
