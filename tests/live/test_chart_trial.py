"""The trial of the chart on Ray nodes that start as KubeRay starts them: a head without cores, a worker, a token."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.rollout.cluster_folder import place
from tests.helm.chart import Values, profile, with_values
from tests.support.chart_nodes import HEAD, WORKER, Nodes, wait
from tests.support.namespaces import joined_namespaces
from tests.support.programs import needs_iproute

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500), needs_iproute]


@pytest.fixture(scope="module")
def values(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Values:
    trial = profile("trial")
    trial["models"][0]["source"] = str(demo_model)
    return with_values(trial, {"storage": {"models": str(tmp_path_factory.mktemp("hub"))}})


@pytest.fixture(scope="module")
def nodes(values: Values) -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="k-", dir=place()))
    with joined_namespaces((HEAD, WORKER), routed=True) as enter:
        started = Nodes(values, enter, folder)
        try:
            started.start("head")
            wait(lambda: started.serve("GET"))
            started.start("worker")
            started.apply(values)
            yield started
        finally:
            for name in list(started.running):
                started.kill(name)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("api", ["rest", "grpc"])
def test_a_picture_is_drawn(nodes: Nodes, api: str) -> None:
    wait(lambda: nodes.draws(api))


def test_the_head_has_neither_gateways_nor_gangs(nodes: Nodes) -> None:
    found = nodes.replicas()
    assert set(found) == {"gateway", "model-demo"}
    assert [address for replicas in found.values() for _, address in replicas] == [WORKER] * 2


def test_whoever_has_no_token_is_told_nothing(nodes: Nodes) -> None:
    status, _ = nodes.ask("GET", f"http://{HEAD}:8265/api/serve/applications/")
    assert status in (401, 403)


def test_changed_limits_restart_nothing(nodes: Nodes, values: Values) -> None:
    before = nodes.replicas()
    changed = with_values(values)
    changed["models"][0] |= {"aliases": ["second"], "max_queued": 5}
    nodes.apply(changed)
    wait(lambda: nodes.ask("GET", f"http://{WORKER}:8000/v1/models/second")[0] == 200)
    wait(lambda: nodes.replicas() == before)  # a replica that is told something is not called running for a moment


def test_a_worker_that_comes_again_serves_again(nodes: Nodes) -> None:
    lost = {actor for replicas in nodes.replicas().values() for actor, _ in replicas}
    nodes.kill("worker")
    assert not nodes.draws("rest")
    nodes.start("worker")
    wait(lambda: nodes.draws("rest"))
    wait(lambda: nodes.draws("grpc"))
    assert not lost & {actor for replicas in nodes.replicas().values() for actor, _ in replicas}
