"""One rank of a larger world whose other ranks do not exist: what a rank computes, without what it waits for.

torch's "fake" process group answers every collective at once with whatever is in the memory. The answer of a forward is
therefore wrong; its kernels, their shapes and their number are those of a rank. All shares must be equally long.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from sp_core import collectives
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import MeshAxis, ParallelMesh


@contextlib.contextmanager
def without_peers(degrees: ParallelDegrees, device_type: str) -> Iterator[ParallelMesh]:
    """The mesh of rank 0, inside the block.

    Args:
        degrees: the layout of the world.
        device_type: `"cuda"` or `"cpu"`.
    """
    new_group = dist.new_group

    def fake_group(ranks: list[int] | None = None, **_: Any) -> Any:
        return new_group(ranks, backend="fake")

    def equal_lengths(length: int, axis: MeshAxis) -> list[int]:
        return [length] * axis.size

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=degrees.world_size)
    try:
        with (
            mock.patch.object(dist, "new_group", fake_group),
            mock.patch.object(collectives, "all_lengths", equal_lengths),
            mock.patch.object(collectives, "on_any_rank", lambda flag, axis: flag),
        ):
            mesh = ParallelMesh.create(degrees, device_type=device_type, timeout_s=60)
            yield mesh
            mesh.close()
    finally:
        dist.destroy_process_group()
