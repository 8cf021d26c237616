"""What a gang occupies and where: `ModelSpec` in, resources of its bundles out, and why they cannot be had.

A Serve replica is a gang: Serve reserves one placement group per replica, all bundles or none, and frees it when the
replica goes. One bundle is one rank; the replica itself needs no device and sits in the first. Called by `service.app`
(to deploy), `workers.gang.rank_group` (to start ranks) and `service.state.model_states` (to explain).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from deploy.memory import format_bytes
from deploy.spec import ModelSpec
from workers.gang.ray_internals import available_resources_per_node

UNITS = {"CPU": "CPU cores", "GPU": "GPUs", "memory": "memory"}

ACCELERATOR = "accelerator_type:"

ACCELERATOR_SHARE = 0.001
"""Ray marks a node's GPU type by a resource of 1 per node, of which any number of ranks may hold a little."""


@dataclass(frozen=True)
class Node:
    """A Ray node, as far as placement matters.

    Attributes:
        resources: in total, by Ray's names.
        labels: Ray's node labels.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str]


def alive_nodes() -> list[Node]:
    """The living nodes of the Ray cluster that this process belongs to."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(node["Resources"], node.get("Labels", {})) for node in nodes if node["Alive"]]


def free_nodes() -> list[Node]:
    """The living nodes with what nobody holds of them."""
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


def bundles_by_node(nodes_of_bundles: Mapping[int, str]) -> list[int]:
    """Bundle indices so that neighbouring ranks share a node, beginning with the node of the first bundle.

    Args:
        nodes_of_bundles: the node id of each bundle, as Ray's placement group table says.
    """
    first_seen = list(dict.fromkeys(nodes_of_bundles[index] for index in sorted(nodes_of_bundles)))
    return sorted(nodes_of_bundles, key=lambda index: (first_seen.index(nodes_of_bundles[index]), index))


def may_host(model: ModelSpec, node: Node) -> bool:
    """Whether a rank of the model may be placed on the node, if it were empty."""
    labels = model.placement.node_labels
    return all(node.labels.get(key) == value for key, value in labels.items()) and _places(node, bundle(model)) > 0


def hosts(model: ModelSpec) -> list[str]:
    """Ids of the living nodes on which a rank of the model may be placed."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    living = {node["NodeID"]: Node(node["Resources"], node.get("Labels", {})) for node in nodes if node["Alive"]}
    return [node_id for node_id, node in living.items() if may_host(model, node)]


def without(model: ModelSpec, nodes: Sequence[Node]) -> list[Node]:
    """What is left of the nodes when a gang of the model is placed on them, as far as they hold it."""
    wanted, missing, left = bundle(model), model.parallel.world_size, []
    for node in sorted(nodes, key=lambda node: -_places(node, wanted)):
        here = min(missing, _places(node, wanted)) if may_host(model, node) else 0
        missing -= here
        taken = {name: node.resources.get(name, 0) - here * wanted.get(name, 0) for name in node.resources}
        left.append(Node(taken, node.labels))
    return left


def unschedulable(model: ModelSpec, nodes: Sequence[Node]) -> str | None:
    """Why no gang of the model can ever be placed on these nodes, even if they were empty; None: it can be."""
    wanted = bundle(model)
    ranks, labels, accelerator = (
        model.parallel.world_size,
        model.placement.node_labels,
        model.placement.accelerator_type,
    )
    fitting = [node for node in nodes if all(node.labels.get(key) == value for key, value in labels.items())]
    if not fitting:
        return f"needs nodes labelled {_labels(labels)}, none of the {len(nodes)} nodes is" if nodes else "no nodes"
    if accelerator:
        fitting = [node for node in fitting if node.resources.get(ACCELERATOR + accelerator)]
        wanted.pop(ACCELERATOR + accelerator)
        if not fitting:
            return f"needs {accelerator} GPUs, no node has any"
    places = [_places(node, wanted) for node in fitting]
    together = model.placement.strategy == "STRICT_PACK"
    if (max(places) if together else sum(places)) >= ranks:
        return None
    resource = min(wanted, key=lambda name: _most(fitting, name, together) / wanted[name])
    needed, there = wanted[resource] * ranks, _most(fitting, resource, together)
    if there >= needed:  # enough of each, but not in one place
        each = " and ".join(amount(name, wanted[name]) for name in wanted)
        has = f"no node holds more than {max(places)}" if together else f"the nodes hold {sum(places)}"
        return f"needs {ranks} ranks of {each} each{' on one node' if together else ''}, {has}"
    where, has = (" on one node", "the largest node has") if together else ("", "all nodes have")
    return (
        f"needs {amount(resource, needed)}{where}, {has} {amount(resource, there).removesuffix(' ' + UNITS[resource])}"
    )


def amount(resource: str, count: float) -> str:
    """So much of a resource, for a person to read: `4 GPUs`, `149.0 GiB memory`."""
    return f"{format_bytes(int(count)) if resource == 'memory' else format(count, 'g')} {UNITS[resource]}"


def _places(node: Node, wanted: Mapping[str, float]) -> int:
    """How many ranks an empty node holds."""
    return min(int(node.resources.get(name, 0) / each + 1e-6) for name, each in wanted.items())


def _most(nodes: Sequence[Node], resource: str, together: bool) -> float:
    amounts = [node.resources.get(resource, 0.0) for node in nodes]
    return max(amounts) if together else sum(amounts)


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
