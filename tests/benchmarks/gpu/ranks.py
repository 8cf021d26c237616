"""Ranks on GPUs, from the ranks of a `RankPool`, which are made for CPUs.

With a GPU for each: over NCCL. With one GPU for several: over gloo by way of the CPU, because NCCL refuses two ranks on
one GPU. On the CPU: over gloo, by the same way.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.benchmarks.gpu.staged import name_what_torch_lacks, staged

TIMEOUT_S = 120.0
"""Of each collective."""


def on_ranks(
    pool: RankPool, degrees: ParallelDegrees, device_type: str, meeting: str | None, fn: Callable[..., Any], *args: Any
) -> list[Any]:
    """Results of `fn(mesh, *args)` on each rank, in rank order.

    Args:
        pool: of at least as many ranks.
        degrees: the layout.
        device_type: `"cuda"` or `"cpu"`.
        meeting: a file that is not there yet, through which the ranks meet over NCCL; None: gloo.
        fn: a function of a module.
        args: what else it gets.
    """
    return pool.run(degrees, _on_device, device_type, meeting, fn, args)


def _on_device(
    mesh: ParallelMesh, device_type: str, meeting: str | None, fn: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    name_what_torch_lacks()
    rank, world = dist.get_rank(), dist.get_world_size()
    if device_type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if meeting is not None:
        dist.destroy_process_group()
        here = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl", init_method=f"file://{meeting}", rank=rank, world_size=world, device_id=here)
    with staged() if meeting is None else contextlib.nullcontext():
        own = ParallelMesh.create(mesh.degrees, device_type=device_type, timeout_s=TIMEOUT_S)
        try:
            return fn(own, *args)
        finally:
            own.close()
