"""What a gang occupies, on which nodes it may be, and why it can be nowhere."""

from typing import Any

import pytest

from deploy.model_sections import Placement
from deploy.model_spec import ModelSpec
from sp_core.degrees import ParallelDegrees
from workers.gang.placement import (
    Node,
    Unschedulable,
    bundle,
    may_host,
    placement_group,
    unschedulable,
)


def a_model(ranks: int = 1, device: Any = "cuda", **placement: Any) -> ModelSpec:
    degrees = ParallelDegrees(ulysses_degree=ranks)
    return ModelSpec(name="a", source="/a", device=device, parallel=degrees, placement=Placement(**placement))


def node(cpus: float = 64, gpus: float = 0, labels: dict[str, str] | None = None, **others: float) -> Node:
    resources = {"CPU": cpus, "memory": 100e9} | ({"GPU": gpus} if gpus else {})
    accelerators = {f"accelerator_type:{kind}": amount for kind, amount in others.items()}
    return Node(resources | accelerators, labels or {})


@pytest.mark.parametrize(
    ("model", "resources"),
    [
        (a_model(), {"CPU": 1.0, "GPU": 1}),
        (a_model(device="cpu", cpus_per_rank=0.25), {"CPU": 0.25}),
        (a_model(memory=5 << 30), {"CPU": 1.0, "GPU": 1, "memory": 5 << 30}),
        (a_model(accelerator_type="H100"), {"CPU": 1.0, "GPU": 1, "accelerator_type:H100": 0.001}),
    ],
)
def test_one_rank_is_one_bundle(model: ModelSpec, resources: dict[str, float]) -> None:
    assert bundle(model) == resources


def test_labels_are_asked_for_only_where_there_are_any() -> None:
    assert placement_group(a_model(3, device="cpu")) == {
        "placement_group_bundles": [{"CPU": 1.0}] * 3,
        "placement_group_strategy": "STRICT_PACK",
    }
    labeled = placement_group(a_model(2, strategy="PACK", node_labels={"zone": "a"}))
    assert labeled["placement_group_strategy"] == "PACK"
    assert labeled["placement_group_bundle_label_selector"] == [{"zone": "a"}]


PACK = {"strategy": "PACK"}
ZONE = {"node_labels": {"zone": "a"}}

OBSTACLES = [
    (a_model(4), [node(gpus=2), node(gpus=1)], "needs 4 GPUs on one node, the largest node has 2"),
    (a_model(4), [node(gpus=2), node(gpus=2)], "needs 4 GPUs on one node, the largest node has 2"),
    (a_model(4), [node(gpus=2), node(gpus=4)], None),
    (a_model(4, **PACK), [node(gpus=2), node(gpus=2)], None),
    (a_model(4, **PACK), [node(gpus=2), node(gpus=1)], "needs 4 GPUs, all nodes have 3"),
    (a_model(), [node()], "needs 1 GPUs on one node, the largest node has 0"),
    (a_model(device="cpu"), [], "no nodes"),
    (a_model(3, device="cpu", cpus_per_rank=0.1), [node(cpus=0.3)], None),  # fractions add up in spite of rounding
    (a_model(3, device="cpu"), [node(cpus=2)], "needs 3 CPU cores on one node, the largest node has 2"),
    (a_model(2, cpus_per_rank=8), [node(cpus=12, gpus=8)], "needs 16 CPU cores on one node, the largest node has 12"),
    (
        a_model(2, device="cpu", cpus_per_rank=3, **PACK),
        [node(cpus=2)] * 4,
        "needs 2 ranks of 3 CPU cores each, the nodes hold 0",
    ),
    (
        a_model(2, memory=80_000_000_000),
        [node(gpus=2)],
        "needs 149.0 GiB memory on one node, the largest node has 93.1 GiB",
    ),
    (a_model(**ZONE), [node(gpus=1), node(gpus=1, labels={"zone": "b"})], "needs nodes labeled zone=a, none of the 2"),
    (a_model(**ZONE), [node(gpus=1, labels={"zone": "a", "disk": "ssd"})], None),
    (
        a_model(2, **ZONE),
        [node(gpus=8), node(gpus=1, labels={"zone": "a"})],
        "needs 2 GPUs on one node, the largest node has 1",
    ),
    (
        a_model(2),
        [node(cpus=64), node(cpus=1, gpus=8)],
        "needs 2 ranks of 1 CPU cores and 1 GPUs each on one node, no node holds more than 1",
    ),
    (
        a_model(2, cpus_per_rank=2, **PACK),
        [node(cpus=64), node(cpus=1, gpus=8), node(cpus=2, gpus=1)],
        "needs 2 ranks of 2 CPU cores and 1 GPUs each, the nodes hold 1",
    ),
    (a_model(2, accelerator_type="H100"), [node(gpus=8, A100=1)], "needs H100 GPUs, no node has any"),
    (a_model(2, accelerator_type="H100"), [node(gpus=8, H100=1)], None),
    (
        a_model(4, accelerator_type="H100"),
        [node(gpus=2, H100=1), node(gpus=8, A100=1)],
        "needs 4 GPUs on one node, the largest node has 2",
    ),
]


@pytest.mark.parametrize(("model", "nodes", "says"), OBSTACLES, ids=[str(row[2]) for row in OBSTACLES])
def test_what_keeps_a_gang_from_being_placed(model: ModelSpec, nodes: list[Node], says: str | None) -> None:
    found = unschedulable(model, nodes)
    assert found is None if says is None else str(found).startswith(says)


def test_what_is_missing_is_a_value() -> None:
    model = a_model(4)
    assert unschedulable(model, [node(gpus=2), node(gpus=1)]) == Unschedulable(model, "GPU", 2)
    both = a_model(2)
    assert unschedulable(both, [node(cpus=64), node(cpus=1, gpus=8)]) == Unschedulable(both, "places", 1)
    assert unschedulable(model, []) == Unschedulable(model, "nodes", 0)


@pytest.mark.parametrize(
    ("model", "there", "may"),
    [
        (a_model(4), node(gpus=1), True),  # one of its ranks, at least
        (a_model(), node(), False),
        (a_model(device="cpu"), node(), True),
        (a_model(device="cpu", cpus_per_rank=65), node(), False),
        (a_model(memory=101_000_000_000), node(gpus=1), False),
        (a_model(**ZONE), node(gpus=1, labels={"zone": "a"}), True),
        (a_model(**ZONE), node(gpus=1, labels={"zone": "b"}), False),
        (a_model(**ZONE), node(gpus=1), False),
        (a_model(accelerator_type="H100"), node(gpus=1, A100=1), False),
        (a_model(accelerator_type="H100"), node(gpus=1, H100=1), True),
    ],
)
def test_which_nodes_may_host_a_rank(model: ModelSpec, there: Node, may: bool) -> None:
    assert may_host(model, there) is may
