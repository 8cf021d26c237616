"""Ranks on GPUs. With a GPU for each, a `RankPool` has them, over NCCL.

With one GPU for several: over gloo by way of the CPU, because NCCL refuses two ranks on one GPU. On the CPU: over gloo,
by the same way.
"""

from collections.abc import Callable
from typing import Any

import torch

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.benchmarks.gpu.staged import name_what_torch_lacks, staged

TIMEOUT_S = 120.0
"""Of each collective."""


def on_ranks(
    pool: RankPool, degrees: ParallelDegrees, device_type: str, fn: Callable[..., Any], *args: Any
) -> list[Any]:
    """Results of `fn(mesh, *args)` on each rank, in rank order.

    Args:
        pool: of at least as many ranks, on GPUs or on the CPU.
        degrees: the layout.
        device_type: where the mesh is: `"cuda"`, or `"cpu"` in a pool on the CPU.
        fn: a function of a module.
        args: what else it gets.
    """
    if pool.device_type == "cuda":
        return pool.run(degrees, _as_it_is, fn, args)
    return pool.run(degrees, _by_way_of_the_cpu, device_type, fn, args)


def _as_it_is(mesh: ParallelMesh, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    name_what_torch_lacks()
    return fn(mesh, *args)


def _by_way_of_the_cpu(mesh: ParallelMesh, device_type: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    name_what_torch_lacks()
    if device_type == "cuda":
        torch.cuda.set_device(0)
        torch.backends.cudnn.allow_tf32 = False  # what is compared must be exact
    with staged():
        own = ParallelMesh.create(mesh.degrees, device_type=device_type, timeout_s=TIMEOUT_S)
        try:
            return fn(own, *args)
        finally:
            own.close()
