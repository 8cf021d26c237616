"""A node that is about to end: its gang and its gateway go on elsewhere, and what they compute is finished first."""

import random
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import psutil
import pytest
from ray.cluster_utils import Cluster

from deploy.gateway_spec import GatewaySpec
from deploy.model_sections import Placement
from deploy.spec import DeploymentSpec, Metrics
from service.rollout.attach import attach
from service.rollout.cluster_folder import place
from service.rollout.drain import drain
from service.rollout.local_cluster import LOOPBACK, METRICS_PORTS
from service.rollout.ports import bind_error
from tests.live.test_faults import hold
from tests.live.test_two_nodes import NODE, deployed, draw
from tests.support.deployments import model, on_rank, rank_statuses, wait_for

pytestmark = pytest.mark.fault

LABELS = {"spray-role": "gateway"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that takes nothing, and one node that takes all."""
    folder = tempfile.mkdtemp(prefix="ray-", dir=place())
    head = NODE | {"num_cpus": 0, "include_dashboard": False, "temp_dir": folder}
    with (
        mock.patch.dict("os.environ", RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S="1"),
        mock.patch("ray._private.utils.write_ray_address"),
        mock.patch("ray._common.utils.reset_ray_address"),
    ):
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**NODE, labels=LABELS)
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def spec(demo_model: Path) -> DeploymentSpec:
    narrow = model(demo_model, "narrow").model_copy(update={"placement": Placement(cpus_per_rank=0.8)})
    port = next(port for port in random.sample(METRICS_PORTS, 20) if not bind_error(LOOPBACK, port))
    gateway = GatewaySpec(port=port, grpc_port=None, node_labels=LABELS)
    return DeploymentSpec(models=(narrow,), gateway=gateway, metrics=Metrics(port=None))


def raylet_of(node_id: str) -> psutil.Process:
    flag = f"--node_id={node_id}"
    return next(each for each in psutil.process_iter() if each.name() == "raylet" and flag in each.cmdline())


def test_what_it_computes_is_finished_while_others_take_over(
    cluster: Cluster, spec: DeploymentSpec, tmp_path: Path
) -> None:
    assert deployed(spec, cluster.address, tmp_path) == 0
    cluster.add_node(**NODE, labels=LABELS)
    with attach(cluster.address), ThreadPoolExecutor(2) as pool:
        (old,) = rank_statuses("narrow")
        (calm := tmp_path / "calm").touch()
        try:
            on_rank("narrow", 0, hold, calm)
            first = pool.submit(draw, spec, "narrow")
            wait_for(lambda: rank_statuses("narrow")[0].phase, lambda phase: phase != "idle")
            drained = pool.submit(drain, raylet_of(old.node_id), 500)
            wait_for(lambda: {status.node_id for status in rank_statuses("narrow")}, lambda nodes: len(nodes) == 2)
            second = draw(spec, "narrow")
            assert second.status_code == 200, second.text
            assert not first.done() and not drained.done()
        finally:
            calm.unlink()
        answer = first.result()
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"] == second.json()["data"]
        assert drained.result(), "something serves there still"
        assert old.node_id not in {status.node_id for status in rank_statuses("narrow")}
        assert draw(spec, "narrow").status_code == 200
