"""What a gang occupies and where: a `ModelSpec` comes in; the resources of its bundles, or what they lack, go out.

A Serve replica is a gang: Serve reserves one placement group per replica, all bundles or none, and frees it when the
replica goes. One bundle is one rank; the replica itself needs no device and sits in the first bundle. Called by
`service.app` (to deploy), `workers.gang.rank_group` (to start ranks), `service.state.model_states` (to explain) and
`service.rollout.preflight` (to refuse).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group, placement_group_table

from deploy.memory import format_bytes
from deploy.model_spec import ModelSpec
from workers.gang.ray_internals import available_resources_per_node

UNITS = {"CPU": "CPU cores", "GPU": "GPUs", "memory": "memory"}

ACCELERATOR = "accelerator_type:"

ACCELERATOR_SHARE = 0.001
"""Ray marks a node's GPU type by a resource of 1 per node, so each rank holds only a sliver of it."""


@dataclass(frozen=True)
class Node:
    """What placement needs to know of a Ray node.

    Attributes:
        resources: amounts by Ray's names; of the whole node, or what is free of it.
        labels: Ray's node labels.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str]


def alive_nodes() -> list[Node]:
    """The living nodes of the Ray cluster that this process belongs to, with all of their resources."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(node["Resources"], node.get("Labels", {})) for node in nodes if node["Alive"]]


def free_nodes() -> list[Node]:
    """The living nodes, with the resources that nobody holds."""
    free = available_resources_per_node()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(free.get(node["NodeID"], {}), node.get("Labels", {})) for node in nodes if node["Alive"]]


def bundle(model: ModelSpec) -> dict[str, float]:
    """The resources of one rank, by Ray's names."""
    placement = model.placement
    resources: dict[str, float] = {"CPU": placement.cpus_per_rank}
    if model.device == "cuda":
        resources["GPU"] = 1
    if placement.memory:
        resources["memory"] = placement.memory
    if placement.accelerator_type:
        resources[ACCELERATOR + placement.accelerator_type] = ACCELERATOR_SHARE
    return resources


def placement_group(model: ModelSpec) -> dict[str, Any]:
    """The placement group of each gang, as options of a Serve deployment."""
    options: dict[str, Any] = {
        "placement_group_bundles": [bundle(model)] * model.parallel.world_size,
        "placement_group_strategy": model.placement.strategy,
    }
    if model.placement.node_labels:
        options["placement_group_bundle_label_selector"] = [dict(model.placement.node_labels)]
    return options


def may_host(model: ModelSpec, node: Node) -> bool:
    """Whether the node, if it were empty, could hold a rank of the model."""
    return _has_labels(model, node) and _places(node, bundle(model)) > 0


def hosts(model: ModelSpec) -> list[str]:
    """Ids of the living nodes on which a rank of the model may be placed."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    living = {node["NodeID"]: Node(node["Resources"], node.get("Labels", {})) for node in nodes if node["Alive"]}
    return [node_id for node_id, node in living.items() if may_host(model, node)]


def without(model: ModelSpec, nodes: Sequence[Node]) -> list[Node]:
    """What is left of the nodes after a gang of the model, or as much of it as they hold, is placed on them."""
    needed, missing, left = bundle(model), model.parallel.world_size, []
    for node in sorted(nodes, key=lambda node: -_places(node, needed)):
        here = min(missing, _places(node, needed)) if may_host(model, node) else 0
        missing -= here
        rest = {name: node.resources.get(name, 0) - here * needed.get(name, 0) for name in node.resources}
        left.append(Node(rest, node.labels))
    return left


@dataclass(frozen=True)
class Unschedulable:
    """What keeps a gang from being placed on some nodes, even if they were empty. `str()` says it to a person.

    Attributes:
        model: whose gang.
        lacks: `nodes` (there are none), `labels` (no node has them), `accelerator` (no node has this type), `places`
            (there is enough of each resource, but not in one place), or the scarcest resource, by Ray's name.
        available: how much of that there is: nodes, places for ranks, or an amount of the resource; on the largest
            node if the gang must be on one, else on all.
    """

    model: ModelSpec
    lacks: str
    available: float

    def __str__(self) -> str:
        ranks, placement, needed = self.model.parallel.world_size, self.model.placement, bundle(self.model)
        together = placement.strategy == "STRICT_PACK"
        where = " on one node" if together else ""
        match self.lacks:
            case "nodes":
                return "no nodes"
            case "labels":
                labels = ", ".join(f"{key}={value}" for key, value in placement.node_labels.items())
                return f"needs nodes labeled {labels}, none of the {self.available:g} nodes is"
            case "accelerator":
                return f"needs {placement.accelerator_type} GPUs, no node has any"
            case "places":
                each = " and ".join(amount(name, needed[name]) for name in needed if name in UNITS)
                hold = "no node holds more than" if together else "the nodes hold"
                return f"needs {ranks} ranks of {each} each{where}, {hold} {self.available:g}"
        has = "the largest node has" if together else "all nodes have"
        found = amount(self.lacks, self.available).removesuffix(f" {UNITS[self.lacks]}")
        return f"needs {amount(self.lacks, needed[self.lacks] * ranks)}{where}, {has} {found}"


def unschedulable(model: ModelSpec, nodes: Sequence[Node]) -> Unschedulable | None:
    """Say what keeps a gang of the model from being placed on these nodes, even if they were empty; None: nothing."""
    if not nodes:
        return Unschedulable(model, "nodes", 0)
    fitting = [node for node in nodes if _has_labels(model, node)]
    if not fitting:
        return Unschedulable(model, "labels", len(nodes))
    needed = bundle(model)
    if model.placement.accelerator_type:
        accelerator = ACCELERATOR + model.placement.accelerator_type
        del needed[accelerator]
        fitting = [node for node in fitting if node.resources.get(accelerator)]
        if not fitting:
            return Unschedulable(model, "accelerator", 0)
    ranks, together = model.parallel.world_size, model.placement.strategy == "STRICT_PACK"
    best = max if together else sum
    places = best([_places(node, needed) for node in fitting])
    if places >= ranks:
        return None
    most = {name: best([node.resources.get(name, 0.0) for node in fitting]) for name in needed}
    scarcest = min(needed, key=lambda name: most[name] / needed[name])
    if most[scarcest] >= needed[scarcest] * ranks:
        return Unschedulable(model, "places", places)
    return Unschedulable(model, scarcest, most[scarcest])


def amount(resource: str, count: float) -> str:
    """An amount of a resource for a person to read: `4 GPUs`, `149.0 GiB memory`."""
    return f"{format_bytes(int(count)) if resource == 'memory' else format(count, 'g')} {UNITS[resource]}"


def _places(node: Node, needed: Mapping[str, float]) -> int:
    """Count the ranks that an empty node holds. Ray's fractions add up with rounding errors, hence the epsilon."""
    return min(int(node.resources.get(name, 0) / each + 1e-6) for name, each in needed.items())


def _has_labels(model: ModelSpec, node: Node) -> bool:
    return all(node.labels.get(key) == value for key, value in model.placement.node_labels.items())


def seconds_to_place() -> float:
    """How long this process's placement group waited until Ray had reserved all of its bundles; 0 outside of one."""
    group = get_current_placement_group()
    told: dict[str, Any] = placement_group_table(group) if group else {}
    return float(told.get("stats", {}).get("end_to_end_creation_latency_ms", 0.0)) / 1e3
