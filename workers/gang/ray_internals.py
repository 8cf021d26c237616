"""What workers needs of Ray and Ray has no public name for. `tests/workers/test_ray_internals.py` pins it.

No other file of workers imports a module of Ray that begins with an underscore.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray._common import tls_utils
from ray._private import state


def available_resources_per_node() -> Mapping[str, Mapping[str, float]]:
    """What nobody holds of each living node, by node id and by Ray's resource names; 0 where a name is absent.

    `ray.available_resources()` has only the sum over all nodes, and `ray.util.state` asks the dashboard, which a
    cluster may lack.
    """
    available: Mapping[str, Mapping[str, float]] = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return available


def process_of(actor: Any) -> tuple[str, int] | None:
    """The id of an actor's node and its process there, before its constructor has returned; None before it has one.

    `ray.util.state` asks the dashboard, which a cluster may lack.
    """
    found: Mapping[str, Any] = state.actors(actor._actor_id.hex())
    return (found["Address"]["NodeID"], found["Pid"]) if found.get("Pid") else None


def keep_replica_on_node_ip() -> None:
    """Let the Serve replica in this process listen at its node's IP only. Call it while the replica is constructed.

    Serve opens a gRPC port on all interfaces for calls between replicas and unpickles what comes in, from anybody: a
    way to run code. Callers use the node's IP, so nothing else needs to be open.

    Raises:
        RuntimeError: Serve has changed, and the port would be open.
    """
    from ray.serve._private import replica  # here: commands import this file too, and have no replica

    if not hasattr(replica, "add_port_to_grpc_server"):
        raise RuntimeError("this version of Ray opens a replica's port in another way; see keep_replica_on_node_ip")
    replica.add_port_to_grpc_server = _add_port_at_node_ip


def _add_port_at_node_ip(server: Any, address: str) -> int:
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    port = address.rpartition(":")[2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    bound: int = tls_utils.add_port_to_grpc_server(server, address)  # type: ignore[no-untyped-call]
    return bound
