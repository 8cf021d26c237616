"""The chart's groups under Ray's autoscaler: a request to a sleeping model adds the nodes that fit, which go again.

The autoscaler reads of the rendered RayCluster what it reads of KubeRay's. Only what makes nodes differs: here they are
processes in the head's namespace, there pods.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.helm.chart import Values, profile, ray_service, render, with_values
from tests.support.chart_nodes import HEAD, Nodes, empty_cluster, wait
from tests.support.programs import needs_iproute

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500), needs_iproute]

GROUPS: list[Values] = [
    {"name": "plain", "cpus": 2},
    {"name": "h100-1x", "cpus": 1, "gpus": 1, "accelerator": "H100", "idleTimeoutSeconds": 5},
    {"name": "h100-2x", "cpus": 2, "gpus": 2, "accelerator": "H100", "idleTimeoutSeconds": 5},
]
"""One without the GPU that the model asks for, one with too few cores for its ranks, and the one that fits."""

SLEEPER: Values = {
    "parallel": {"ulysses_degree": 2},
    "placement": {"cpus_per_rank": 1, "accelerator_type": "H100"},
    "autoscaling": {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 1, "downscale_to_zero_delay_s": 2},
}

SPANS = {
    "name": "pair",
    "placement": SLEEPER["placement"] | {"strategy": "PACK", "node_labels": {"spray-role": "h100-1x"}},
}
"""Another such model, whose ranks are on two nodes."""

PROVIDER = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"

FAKE = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
"""What Ray's provider of pretended nodes asks for."""


def autoscaling_config(service: Any) -> dict[str, Any]:
    """What KubeRay's autoscaler makes of the RayCluster, for the provider of pretended nodes."""
    named = {"metadata": {"name": "a", "namespace": "a"}, "spec": service["spec"]["rayClusterConfig"]}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(named)
    types = config["available_node_types"]
    types[FAKE_HEAD_NODE_TYPE] = types.pop(config["head_node_type"])
    for each in types.values():
        each["resources"]["object_store_memory"] = 10**8
        del each["resources"]["memory"]  # the provider cannot give any
    provider = {
        "type": "external",
        "module": PROVIDER,
        "gcs_address": f"{HEAD}:6379",
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    kept = {key: value for key, value in config["provider"].items() if key.startswith("disable")}
    return config | {"head_node_type": FAKE_HEAD_NODE_TYPE, "provider": kept | provider | {"launch_multiple": True}}


@pytest.fixture(scope="module")
def values(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Values:
    trial = profile("trial")
    trial["models"][0] |= SLEEPER | {"source": str(demo_model)}
    trial["models"].append(trial["models"][0] | SPANS)
    told_apart = [group | {"labels": {"spray-role": group["name"]}, "maxReplicas": 2} for group in GROUPS]
    return with_values(trial, {"groups": told_apart, "storage": {"models": str(tmp_path_factory.mktemp("hub"))}})


@pytest.fixture(scope="module")
def nodes(values: Values) -> Iterator[Nodes]:
    with empty_cluster(values) as started:
        config = started.folder / "autoscaling.json"
        config.write_text(json.dumps(autoscaling_config(ray_service(render(values)))))
        started.flags["head"] = [f"--autoscaling-config={config}"]
        started.environments["head"] = FAKE
        started.start("head")
        wait(lambda: started.serve("GET"))
        started.apply(values)
        yield started


def groups(nodes: Nodes, state: str = "ALIVE") -> Counter[str]:
    """How many nodes of each group there are, but for the head."""
    _, answer = nodes.ask("GET", f"http://{HEAD}:8265/api/v0/nodes?detail=1", nodes.token)
    found = answer["data"]["result"]["result"]
    return Counter(
        each["labels"]["spray-role"] for each in found if each["state"] == state and not each["is_head_node"]
    )


def test_a_request_adds_the_node_that_fits_and_it_goes(nodes: Nodes) -> None:
    wait(lambda: nodes.ask("GET", f"http://{HEAD}:8000/v1/models/demo")[0] == 200)
    assert groups(nodes) == {"gateway": 1}  # `minReplicas`, and no work yet

    assert nodes.draws("rest", HEAD)
    assert groups(nodes) == {"gateway": 1, "h100-2x": 1}

    wait(lambda: groups(nodes) == {"gateway": 1})
    assert groups(nodes, "DEAD") == {"h100-2x": 1}  # no other was tried meanwhile
    status, answer = nodes.ask("GET", f"http://{HEAD}:8000/v1/models/demo")
    assert (status, answer["state"]) == (200, "asleep")


def test_a_gang_that_spans_nodes_adds_all_that_it_needs_and_they_go(nodes: Nodes) -> None:
    before = groups(nodes, "DEAD")
    assert nodes.draws("rest", HEAD, "pair")
    assert groups(nodes) == {"gateway": 1, "h100-1x": 2}
    wait(lambda: groups(nodes) == {"gateway": 1})
    assert groups(nodes, "DEAD") - before == {"h100-1x": 2}
