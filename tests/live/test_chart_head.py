"""The head is lost: with the chart's Redis, gangs and gateways go on, and the head that comes again knows them."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helm.chart import Values, of_kind, profile, ray_service, render, with_values
from tests.support.chart_nodes import HEAD, WORKER, Nodes, empty_cluster, wait
from tests.support.programs import needs, needs_iproute

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1500),
    needs_iproute,
    needs("redis-server", "Ray's state outlives the head in a Redis"),
]

PASSWORD = "secret"
PORT = 6380
"""Of Redis, in the head's namespace; a pod of its own has 6379, as the head has."""


@pytest.fixture(scope="module")
def values(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Values:
    trial = profile("trial")
    trial["models"][0]["source"] = str(demo_model)
    redis = {"redis": {"bundled": {"enabled": True}, "existingSecret": "redis"}}
    return with_values(trial, redis, {"storage": {"models": str(tmp_path_factory.mktemp("hub"))}})


@pytest.fixture(scope="module")
def nodes(values: Values) -> Iterator[Nodes]:
    """What KubeRay adds to the nodes when `gcsFaultToleranceOptions` are set is added here."""
    objects = render(values)
    assert ray_service(objects)["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]
    (redis,) = of_kind(objects, "StatefulSet")
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    *shell, line = container["command"]
    head = {"RAY_REDIS_ADDRESS": f"{HEAD}:{PORT}", "RAY_external_storage_namespace": "a", "REDIS_PASSWORD": PASSWORD}
    worker = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
    with empty_cluster(values) as started:
        started.flags["head"] = [f"--redis-password={PASSWORD}"]
        started.environments |= {"head": head, "worker": worker}
        command = [*started.enter["head"], *shell, f"{line.replace('/data', str(started.folder))} --port {PORT}"]
        keeper = subprocess.Popen(command, env=os.environ | {"REDISCLI_AUTH": PASSWORD}, stdout=subprocess.DEVNULL)
        try:
            started.start("head")
            wait(lambda: started.serve("GET"))
            started.start("worker")
            started.apply(values)
            wait(lambda: started.draws("rest"))
            yield started
        finally:
            keeper.kill()
            keeper.wait()


def test_requests_go_on_without_the_head_which_comes_again(nodes: Nodes, values: Values) -> None:
    before = nodes.replicas()
    assert sum(map(len, before.values())) == 2
    nodes.kill("head")
    for api in ("rest", "grpc", "rest"):
        assert nodes.draws(api), "nobody draws without the head"
    nodes.start("head")
    wait(lambda: nodes.serve("GET"))
    wait(lambda: nodes.replicas() == before)
    changed = with_values(values)
    changed["models"][0] |= {"aliases": ["second"]}
    nodes.apply(changed)
    wait(lambda: nodes.ask("GET", f"http://{WORKER}:8000/v1/models/second")[0] == 200)
    wait(lambda: nodes.replicas() == before)
