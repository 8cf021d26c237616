"""The trial of the chart on Ray nodes that start as KubeRay starts them: a head without cores, a worker, a token."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helm.chart import Values, profile, with_values
from tests.support.chart_nodes import ADDRESSES, HEAD, WORKER, Nodes, empty_cluster, wait
from tests.support.programs import needs_iproute

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500), needs_iproute]

PROBES = ("liveness", "readiness")


@pytest.fixture(scope="module")
def values(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Values:
    trial = profile("trial")
    trial["models"][0]["source"] = str(demo_model)
    return with_values(trial, {"storage": {"models": str(tmp_path_factory.mktemp("hub"))}})


@pytest.fixture(scope="module")
def at_first() -> dict[tuple[str, str], bool]:
    """What probes say before anything is to be served; `nodes` tries them."""
    return {}


@pytest.fixture(scope="module")
def nodes(values: Values, at_first: dict[tuple[str, str], bool]) -> Iterator[Nodes]:
    with empty_cluster(values) as started:
        started.start("head")
        wait(lambda: started.serve("GET"))
        started.start("worker")
        wait(lambda: started.probe("worker", "liveness"))
        at_first |= {(name, kind): started.probe(name, kind) for name in ADDRESSES for kind in PROBES}
        started.apply(values)
        yield started


def test_a_node_is_ready_when_it_serves(nodes: Nodes, at_first: dict[tuple[str, str], bool]) -> None:
    assert {probe for probe, succeeded in at_first.items() if not succeeded} == {("worker", "readiness")}
    wait(nodes.all_run)
    assert nodes.probe("worker", "readiness"), "KubeRay sends callers to a node that is not ready"


@pytest.mark.parametrize("api", ["rest", "grpc"])
def test_a_picture_is_drawn(nodes: Nodes, api: str) -> None:
    wait(lambda: nodes.draws(api))


def test_probes_succeed_under_load(nodes: Nodes) -> None:
    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(nodes.draws, api) for api in ("rest", "grpc") * 4]
        told = []
        while not all(each.done() for each in drawn):
            told.append([nodes.probe(name, kind) for name in ADDRESSES for kind in PROBES])
    assert all(each.result() for each in drawn)
    assert len(told) > 2 and all(map(all, told))


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
    assert not any(nodes.probe("worker", kind) for kind in PROBES)
    nodes.start("worker")
    wait(lambda: nodes.draws("rest"))
    wait(lambda: nodes.draws("grpc"))
    assert not lost & {actor for replicas in nodes.replicas().values() for actor, _ in replicas}
