"""How the ranks of a gang find one another: a store that rank 0 hosts, the process group, the mesh.

Called by `workers.gang.rank` when it starts.
"""

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deploy.model_spec import ModelSpec
from sp_core.degrees import smaller_layouts
from sp_core.mesh import ParallelMesh
from sp_core.probe import probe


def host_store(host: str, timeout_s: float) -> tuple[Any, int]:
    """On rank 0: the store where the ranks meet, and its port. It ends with the last reference to it.

    Args:
        host: the address to bind, reachable by all ranks.
        timeout_s: how long ranks may wait for one another.
    """
    listener = socket.create_server((host, 0))  # bound here and handed over: no other program can take the port
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, port


def find_store(host: str, port: int, timeout_s: float) -> Any:
    """On the other ranks: the store that rank 0 hosts."""
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=False, wait_for_workers=False, timeout=timeout
    )


def form_mesh(store: Any, rank: int, model: ModelSpec, device: torch.device) -> ParallelMesh:
    """Meet the other ranks, and try every group of them once.

    Raises:
        RuntimeError: they did not meet within the start-up limit, or receive wrong data from one another.
    """
    limits, degrees = model.timeouts, model.parallel
    dist.init_process_group(
        "nccl" if model.device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=degrees.world_size,
        timeout=timedelta(seconds=limits.startup_s),
        device_id=device if model.device == "cuda" else None,  # opens communicators now, not in a step
    )
    mesh = ParallelMesh.create(
        degrees,
        device_type=model.device,
        timeout_s=limits.phase_s,
        control_timeout_s=max(limits.startup_s, limits.phase_s),
        smaller=smaller_layouts(degrees, model.elastic.min_degree) if model.elastic else (),
    )
    for layout in reversed(mesh.layouts):  # the gang's own is the last to be used
        mesh.use(layout)
        probe(mesh)
    return mesh
