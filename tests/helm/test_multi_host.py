"""Groups whose nodes come and go together, as Ray's own autoscaler reads them: what is asked of KubeRay for a gang."""

from typing import Any
from unittest import mock

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider import KubeRayProvider
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from tests.helm.chart import Values, profile, ray_service, render, serve_config_of, with_values

SET = "h100-2x8"


def cluster_of(values: Values) -> Any:
    """The RayCluster that KubeRay makes."""
    return {
        "metadata": {"name": "a", "namespace": "a"},
        "spec": ray_service(render(values))["spec"]["rayClusterConfig"],
    }


def launched(values: Values) -> dict[str, int]:
    """The nodes that Ray's autoscaler adds when the first model's gang is waited for."""
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster_of(values)), skip_content_hash=True)
    (model,) = serve_config_of(render(values))["applications"][0]["deployments"]
    gang = GangResourceRequest(
        requests=[ResourceRequestUtil.make(bundle) for bundle in model["placement_group_bundles"]]
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=[gang],
        )
    )
    assert not reply.infeasible_gang_resource_requests
    return {each.instance_type: each.count for each in reply.to_launch}


class Kubernetes:
    """What the autoscaler asks of Kubernetes' API: a RayCluster and its pods; what it changes is kept.

    Args:
        cluster: the RayCluster.
        pods: names of the set's pods, which all run.
    """

    def __init__(self, cluster: Any, pods: tuple[str, ...]) -> None:
        self.cluster, self.pods = cluster, pods
        self.changed: dict[str, Any] = {}

    def get(self, path: str) -> Any:
        if path.startswith("rayclusters/"):
            return self.cluster
        labels = {"ray.io/node-type": "worker", "ray.io/group": SET}
        status = {"containerStatuses": [{"state": {"running": {}}}]}
        pods = [
            {"metadata": {"name": name, "labels": labels, "annotations": {}}, "status": status} for name in self.pods
        ]
        return {"metadata": {"resourceVersion": "1"}, "items": pods}

    def patch(self, _: str, payload: list[dict[str, Any]]) -> Any:
        self.changed |= {change["path"].rpartition("/")[2]: change["value"] for change in payload}
        return self.cluster


def provider(kubernetes: Kubernetes) -> KubeRayProvider:
    return KubeRayProvider("a", {"namespace": "a"}, mock.Mock(), kubernetes)


def test_a_waiting_gang_adds_one_set_of_nodes() -> None:
    values = profile("multi-node")
    added = launched(values)
    assert added[SET] == 2
    kubernetes = Kubernetes(cluster_of(values), ())
    provider(kubernetes).launch({SET: added[SET]}, "first")
    assert kubernetes.changed == {"replicas": 1}


def test_nodes_that_come_one_by_one_are_as_many_as_the_gang_needs() -> None:
    values = profile("multi-node")
    values["groups"][0] |= {"hosts": 1, "maxReplicas": 4}
    assert launched(values)[SET] == 2


def with_a_set(values: Values) -> Kubernetes:
    cluster = cluster_of(values)
    (group,) = (each for each in cluster["spec"]["workerGroupSpecs"] if each["groupName"] == SET)
    group["replicas"] = 1
    return Kubernetes(cluster, ("first", "second"))


def test_both_nodes_go_when_both_are_idle() -> None:
    kubernetes = with_a_set(profile("multi-node"))
    provider(kubernetes).terminate(["first", "second"], "idle")
    assert kubernetes.changed["replicas"] == 0
    assert kubernetes.changed["scaleStrategy"] == {"workersToDelete": ["first", "second"]}


def test_one_idle_node_would_take_the_set_along() -> None:
    """Why helm refuses a gang that leaves a node of its set idle."""
    kubernetes = with_a_set(profile("multi-node"))
    provider(kubernetes).terminate(["first"], "idle")
    assert kubernetes.changed["replicas"] == 0


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_group_that_always_runs_has_all_its_nodes(hosts: int) -> None:
    values = with_values(profile("multi-node"))
    values["groups"][0] |= {"hosts": hosts, "minReplicas": 2, "maxReplicas": 2}
    types = _derive_autoscaling_config_from_ray_cr(cluster_of(values))["available_node_types"]
    assert types[SET]["min_workers"] == types[SET]["max_workers"] == 2 * hosts
